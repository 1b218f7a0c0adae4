"""Federated methods, one file a published method. `method.names()` lists them, `method.build(spec)` makes one.

Every module in this folder is imported once, so a new method is a new file and nothing else.
"""

import importlib
import pkgutil

from hocket.methods.base import Client, Job, Local, Method, State, Update, method

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Client", "Job", "Local", "Method", "State", "Update", "method"]
