"""One round of a federation: its clients, what they are asked, and what a configuration requires of its method."""
