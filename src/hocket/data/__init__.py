"""Data: rows from anywhere, templates, encoding, partitions, and the built-in set `docstrings`."""

from hocket.data.encode import Encoded, collate, encode
from hocket.data.load import load
from hocket.data.partition import partition
from hocket.data.prepare import Prepared, prepare
from hocket.data.templates import render

__all__ = ["Encoded", "Prepared", "collate", "encode", "load", "partition", "prepare", "render"]
