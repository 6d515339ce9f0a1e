"""The `fedspan` command."""
