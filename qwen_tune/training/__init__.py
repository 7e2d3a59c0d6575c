"""A run: its schedule, its trainer, its checkpoints, and what it says and keeps."""
