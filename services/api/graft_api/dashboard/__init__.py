"""The dashboard: a page that speaks the public HTTP API, served beside it."""
