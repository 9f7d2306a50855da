"""The worker: claims jobs, prepares data, trains adapters, and proves what it publishes."""
