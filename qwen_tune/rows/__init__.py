"""From files to rows that can be trained on. Nothing here knows a model."""
