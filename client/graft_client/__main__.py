"""`python -m graft_client` is the `graft` command."""

from graft_client.cli import main

main()
