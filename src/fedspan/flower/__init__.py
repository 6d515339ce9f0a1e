"""Federations of real sites over Flower, which carries the messages: the only folder that imports flwr.

It needs the extra `fedspan[flower]`.
"""

from fedspan.flower.log_levels import set_environment

# Here, because Flower reads these variables when it is imported, and this file runs before any other of the folder.
set_environment()
