"""Directories that others will load: written whole or not at all, with everything that belongs beside weights."""
