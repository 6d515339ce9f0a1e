"""One client's side of a federation of real sites: its data, its state on disk, its worker process."""
