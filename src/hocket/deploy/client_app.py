"""A site's Flower app: hands each message to the worker beside it. Installed with hocket: a run ships no code, its app
names `hocket.deploy.client_app:app`.

Heads of messages, by `op`:

    hello  {run, recipe, client}               -> {name} without `client`; {name, rows, version} with it
    part   {run, job, offset, last} + bytes    -> {}
    do     {run, asks, packets, forget, job, timeout, part} + packets, one after the other, if they fit into one part
                                               -> {told, size} + the first bytes of the upload, or {wait}
    fetch  {run, job, offset, part}            -> {} + bytes
    pair   {run, key, timeout, place}          -> {}, or nothing at all (see `hocket.deploy.courier.pair`)

and {failed, reason} for what cannot be done (see `hocket.deploy.nouns.Failed`).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hocket.deploy import courier
from hocket.deploy.messages import content, read

log = logging.getLogger(__name__)

FOLDER = "HOCKET_SITE"
"""Environment variable: the site's folder, where its worker listens. Flower's `--node-config site=...` names it."""


def handle(head: Mapping[str, Any], body: bytes | None, folder: Path, name: str) -> tuple[dict[str, Any], bytes | None]:
    """The answer to a message: its head and its bytes. What failed is told without this machine's paths."""
    told, data = _answer(head, body, folder, name)
    if "reason" in told:
        log.warning("%s: %s", head.get("op"), told["reason"])
        told = {**told, "reason": courier.unplaced(str(told["reason"]))}
    return told, data


def _answer(
    head: Mapping[str, Any], body: bytes | None, folder: Path, name: str
) -> tuple[dict[str, Any], bytes | None]:
    try:
        op, run = str(head["op"]), str(head["run"])
        if not run or not all(c.isalnum() or c in "-_" for c in run):
            raise ValueError(f"'{run}' is no name of a run")
        here = folder / "runs" / run
        if op == "hello":
            if "client" not in head:
                return {"name": name}, None
            opened = courier.ask(folder, {"op": "open", **{k: head[k] for k in ("run", "recipe", "client")}})
            return opened | {"name": name}, None
        if op == "part":
            courier.store(here / f"down-{int(head['job'])}.hkt", int(head["offset"]), body or b"", bool(head["last"]))
            return {}, None
        if op == "fetch":
            return {}, courier.fetch(here / f"update-{int(head['job'])}.hkt", int(head["offset"]), int(head["part"]))
        if op == "pair":
            courier.pair(here / f"pair-{int(head['key'])}", int(head["place"]), float(head["timeout"]))
            return {}, None
        if op == "do":
            at = 0
            for job, size in head["packets"]:
                courier.store(here / f"down-{int(job)}.hkt", 0, memoryview(body or b"")[at : at + int(size)], last=True)
                at += int(size)
            if head["asks"] or head["forget"]:
                taken = courier.ask(folder, {k: head[k] for k in ("run", "asks", "forget")} | {"op": "take"})
                if "failed" in taken:
                    return taken, None
            question = {k: head[k] for k in ("run", "job", "timeout")} | {"op": "answer"}
            found = courier.ask(folder, question)
            if "size" not in found:
                return found, None
            first = courier.fetch(here / f"update-{int(head['job'])}.hkt", 0, int(head["part"]))
            return {k: found[k] for k in ("told", "size")}, first
        return {"failed": "job", "reason": f"unknown message '{op}'; do server and site have the same hocket?"}, None
    except courier.NoWorker as error:
        return {"failed": "link", "reason": str(error)}, None
    except (KeyError, TypeError, ValueError, OSError) as error:
        return {"failed": "job", "reason": courier.plain(error)}, None


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one message of the server app's."""
    folder = os.environ.get(FOLDER) or str(context.node_config.get("folder", ""))
    name = str(context.node_config.get("site", ""))
    answer: tuple[dict[str, Any], bytes | None]
    if folder:
        head, body = read(message.content)
        try:
            answer = handle(head, body, Path(folder), name)
        except courier.Unanswered:
            signal.raise_signal(signal.SIGTERM)  # ends the task in order; a plain error would be a reply
            raise
    else:
        answer = {"failed": "job", "reason": f"this node knows no folder: start it with {FOLDER} set"}, None
    return Message(content(*answer), reply_to=message)
