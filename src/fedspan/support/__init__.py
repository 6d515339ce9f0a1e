"""Helpers that know nothing of federated learning: seeds, threads, files, errors, peak memory."""
