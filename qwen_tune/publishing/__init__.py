"""A run as others get it: checked, described and uploaded."""
