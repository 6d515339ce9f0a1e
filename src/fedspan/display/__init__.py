"""Progress, tables and pictures of runs."""
