"""Whole runs: from a configuration to a run folder with checkpoints, metrics, adapters and a summary."""
