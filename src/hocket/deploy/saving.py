"""A deployment between two events as plain data and tensors, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hocket import wire
from hocket.deploy.site import job_of, plain
from hocket.deploy.ways import Out, Way, same

if TYPE_CHECKING:
    from hocket.deploy.engine import Deployment


def state(d: Deployment) -> dict[str, Any]:
    """All that is not on disk already."""
    outs = [{**vars(o), "job": plain(o.job)} for o in d.out.values()]
    ways = {c: {"waiting": w.waiting, "sent": w.sent, "forget": w.forget} for c, w in d.ways.items()}
    return {
        "server": d.server.state_dict(), "out": outs, "ways": ways, "t": d.t, "requests": d.requests,
        "events": d.events, "begun": d.begun, "evaluations": d.evaluations.state_dict(),
        "ledger": d.ledger.state_dict(), "norms": d.norms.seen, "bounds": d.bounds,
        "rows": {c: who.rows for c, who in d.server.clients.items()},
    }  # fmt: skip


def load(d: Deployment, saved: dict[str, Any]) -> None:
    """Have `d` go on from what `state` gave."""
    d.ledger.load_totals(saved["ledger"])
    d.server.load_state_dict(saved["server"], lambda job: d.up.decode(wire.Packet(d.upload(job))))
    d.out = {o["job"]["id"]: Out(**{**o, "job": job_of(o["job"])}) for o in saved["out"]}
    d.ways = {int(c): Way(list(w["waiting"]), list(w["sent"]), list(w["forget"])) for c, w in saved["ways"].items()}
    d.requests, d.events, d.begun = saved["requests"], saved["events"], saved["begun"]
    d.evaluations.load_state_dict(saved["evaluations"])
    d.norms.seen = list(saved["norms"])
    version, bounds = d.server.version, {int(c): v for c, v in saved.get("bounds", {}).items()}
    d.bounds, d.first = {c: min(bounds.get(c, version), version) for c in d.server.clients}, d.server.next_id
    for c, rows in saved.get("rows", {}).items():  # an update may be heard before its site has joined again
        d.server.clients[int(c)] = replace(d.server.clients[int(c)], rows=rows)
    d.origin = d.now() - saved["t"]
    d.missed, d.patient = set(d.server.online), d.t + d.rejoin
    d.away = dict.fromkeys(d.ways, d.patient)
    for c in d.server.clients:
        d.server.left(c)


def recover(d: Deployment) -> None:
    """Have `d` hear again what had arrived after the last checkpoint, in the order of arrival."""
    told = [(p.stat().st_mtime_ns, int(p.stem)) for p in d.inbox.glob("*.json")]
    for _, job in sorted(told):
        out, packet = d.out.get(job), d.upload(job)
        try:
            note = dict(json.loads(d.told(job).read_text()))
        except (ValueError, TypeError):  # torn with its machine; its site is asked again
            d.told(job).unlink()
            packet.unlink(missing_ok=True)
            continue
        if out is not None and packet.exists() and same(note, out.job):
            way = d.ways[out.job.client]
            if job in way.waiting:  # its message left after the checkpoint
                way.waiting.remove(job)
                way.sent.append(job)
            d.take(way, out, note, packet)
