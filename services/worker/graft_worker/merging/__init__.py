"""The child that merges an adapter into its full-precision base, on the CPU."""
