"""A server rule applied outside a run: once to adapter folders, or round by round in a loop of your own."""
