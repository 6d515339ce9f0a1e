"""Limits on what the server and others learn about one client: masked sums in fixed point, and differential privacy."""
