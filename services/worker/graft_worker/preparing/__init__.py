"""Preparing: raw rows in, tokens and a report out; without torch, without network."""
