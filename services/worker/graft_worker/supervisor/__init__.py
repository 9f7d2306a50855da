"""The supervisor: holds the lease, fetches, starts the child, watches it, publishes, settles. Knows no torch."""
