"""A real Docker engine for the slow tests, and stand-ins for base images that cannot be pulled here."""
