"""What the server may learn of one client: the sum alone, in fixed point, under masks; and with how much noise."""
