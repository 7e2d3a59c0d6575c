"""How well a model does: loss on held-out examples, merged against base and adapter, and answers."""
