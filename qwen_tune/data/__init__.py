"""Data files into examples that train and evaluate: read, mixed, split, tokenized, cached and packed."""
