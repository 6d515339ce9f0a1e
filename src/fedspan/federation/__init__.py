"""One round of a federation: its clients, what they are asked, and what a configuration demands of its method."""
