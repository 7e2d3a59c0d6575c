"""Recipes: one file that says everything, read strictly."""
