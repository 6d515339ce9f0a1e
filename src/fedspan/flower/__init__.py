"""Federations of real sites over Flower, which carries the messages: the only folder that imports flwr.

It needs the extra `fedspan[flower]`.
"""
