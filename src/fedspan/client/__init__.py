"""The work of a client: training, evaluation, and the processes that do it for many clients at once."""
