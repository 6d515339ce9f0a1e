"""Helpers that know nothing about federated learning: seeds, threads, files, errors, peak memory."""
