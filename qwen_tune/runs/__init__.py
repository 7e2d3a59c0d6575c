"""What a run leaves on the disk: its directory, its checkpoints, and how it goes on from them."""
