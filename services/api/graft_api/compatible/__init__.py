"""OpenAI's names for the same files, jobs and base models, under `/v1`: all that its clients need is `base_url=`."""
