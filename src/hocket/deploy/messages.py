"""Flower messages: a JSON head and, where there are any, the raw bytes of a part of a packet. No torch here.

Bytes travel as they are (`stype` "hocket.raw"), so the codecs own dtypes; Flower's way through numpy refuses bf16.
"""

from __future__ import annotations

import json
from typing import Any

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
except ImportError as error:  # pragma: no cover - where the extra is missing
    from hocket.errors import HocketError

    raise HocketError("deployment needs Flower: pip install 'hocket[flower]'") from error

RAW = "hocket.raw"


def content(head: dict[str, Any], data: bytes | None = None) -> RecordDict:
    """What a message carries."""
    records: dict[str, Any] = {"head": ConfigRecord({"json": json.dumps(head, separators=(",", ":"))})}
    if data is not None:
        records["body"] = ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(data),), stype=RAW, data=data)})
    return RecordDict(records)


def read(records: RecordDict) -> tuple[dict[str, Any], bytes | None]:
    """The inverse of `content`; the body's record is taken out, so that nothing holds the bytes twice.

    Raises:
        ValueError: this is no message of ours.
    """
    try:
        head = json.loads(str(records["head"]["json"]))
        array: Any = records.pop("body")["bytes"] if "body" in records else None
        body = None if array is None else array.data
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a message of hocket's: {type(error).__name__}: {error}") from error
    if not isinstance(head, dict):
        raise ValueError("not a message of hocket's: its head is no JSON object")
    return head, body
