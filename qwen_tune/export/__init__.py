"""Readers of a merge's stream beside safetensors: one module for each format."""
