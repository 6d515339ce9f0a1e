"""Data of a run: reading (:func:`load`), and tokenising or processing it once (:func:`encode`)."""

from fedspan.data.encode import Encoded, encode
from fedspan.data.load import load
from fedspan.data.rows import Corpus, Kind, Rows

__all__ = ["Corpus", "Encoded", "Kind", "Rows", "encode", "load"]
