"""LoRA training that saves less: decoder layers whose backward is written by hand, in plain PyTorch."""
