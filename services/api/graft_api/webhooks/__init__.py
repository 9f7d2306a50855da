"""Webhooks: what signs them, a try, and what became of a job's."""
