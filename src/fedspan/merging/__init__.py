"""Server rules outside a run: applied once to adapter folders, or round by round in a training loop of your own."""
