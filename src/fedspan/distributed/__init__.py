"""The processes that torchrun starts for one run: their meeting, their signs of life, and the dealing of work."""
