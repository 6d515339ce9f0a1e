"""`fedspan bench`: every part of a federated run, timed against the alternatives on the same machine.

A suite is one short file that makes cases; a case is a set of arms that do the same work. `harness.py` times the arms
in turn, checks that they agree, and writes one JSON object per measurement; tables and plots are computed from that
file alone.
"""
