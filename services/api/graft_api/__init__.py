"""The HTTP face: parses, admits, answers; decides nothing about training."""
