"""A region's server: to its sites the server, to the server above one site whose answer is the sum of theirs."""
