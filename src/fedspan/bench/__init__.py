"""`fedspan bench`: every part of a federated run timed beside what else does it, in one process tree and one file.

A suite is one short file that makes cases; a case is a set of arms that do the same work; `harness.py` times the
arms in turn, checks that they agree, and writes one JSON object per measurement. Everything that is shown is
computed from that file.
"""
