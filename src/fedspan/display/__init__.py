"""Progress, tables and pictures of runs, for the command and the public functions."""
