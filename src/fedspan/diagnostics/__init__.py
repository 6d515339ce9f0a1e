"""Measurements of what a server step did to its clients' updates."""
