"""Servers that stand in for the Hub, ModelScope and W&B, each with the protocol that its real client speaks."""
