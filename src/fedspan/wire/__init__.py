"""Messages between a server and its sites: their bytes, their precision, their sizes, and the transport interface."""
