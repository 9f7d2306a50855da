"""SDK and command line; knows only HTTP."""
