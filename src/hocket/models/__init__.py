"""Models: fetched by name (`hub`), opened from a hub id, folder or GGUF file (`load`), tiny random ones (`tiny`)."""

from hocket.models.hub import KNOWN, cache_dir, listing, pull, resolve
from hocket.models.load import Loaded, export, load

__all__ = ["KNOWN", "Loaded", "cache_dir", "export", "listing", "load", "pull", "resolve"]
