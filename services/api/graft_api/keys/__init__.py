"""Keys: what they look like, what each may do, and whose one is."""
