"""Base models: which there are, and how a name becomes a shape."""
