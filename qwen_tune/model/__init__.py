"""The base checkpoint: its files, its tokenizer, and the model in memory with its adapter."""
