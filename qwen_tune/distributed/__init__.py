"""The processes of a run: their number and place, how they start, and what they agree on."""
