"""Outages, one kind at a time and for as long as they last in life: `make outages`."""
