"""Base and adapter into a full model, with proof."""
