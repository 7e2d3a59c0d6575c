"""Base checkpoints, tokenizers and adapters: as files, in memory, and asked for an answer."""
