"""The errors a user can meet. Each message names the field, file or packet and says what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class HocketError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback."""


class RecipeError(HocketError):
    """A recipe field is unknown, of the wrong type, or cannot be combined with another."""


class DataError(HocketError):
    """A data set, template or partition cannot be used."""


class ModelError(HocketError):
    """A model or tokenizer cannot be found, fetched, verified or loaded."""


class WireError(HocketError):
    """A packet is damaged, truncated, oversized or not ours."""


class StoreError(HocketError):
    """A run folder or checkpoint cannot be read, written or resumed."""


class RunError(HocketError):
    """A run cannot go on, for example because no client can be reached."""


class Interrupted(Exception):
    """Training or evaluation was asked to stop; the event in progress has not happened."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"` for the names closest to `name`, or the whole list if none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(options)


def need(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Raises:
        HocketError: the module is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HocketError(f"'{module}' is not installed: pip install 'hocket[{extra}]'") from error
