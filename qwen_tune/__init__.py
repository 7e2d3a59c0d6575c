"""Fine-tuning of Qwen models with LoRA, from one recipe."""

__version__ = "0.1.0"
