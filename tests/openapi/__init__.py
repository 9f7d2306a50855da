"""Schemathesis against the served OpenAPI document: what the document promises is what the API does."""
