"""The server's side of a federation of real sites, over any transport."""
