"""What a run leaves on the disk: its directory, its checkpoints, and how it resumes from them."""
