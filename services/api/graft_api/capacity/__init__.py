"""The VRAM-capacity table and the live fleet over HTTP."""
