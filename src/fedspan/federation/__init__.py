"""One round of a federation: the clients, what a round asks of them, and what a method requires of a configuration."""
