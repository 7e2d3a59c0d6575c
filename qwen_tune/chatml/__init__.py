"""From a conversation to the exact tokens that a server would send, and to those that are supervised."""
