"""Rows made ready for training: tokenized, cached, mixed, split, packed, audited and shown."""
