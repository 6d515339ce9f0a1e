"""Federations of real sites over Flower, which carries the messages: the only folder that imports flwr.

It needs the extra `fedspan[flower]`.
"""

from fedspan.flower.log_levels import hush

hush()  # here, because this file runs before any other of the folder can import flwr
