"""OpenAI's names for the same files, jobs and base models, under `/v1`."""
