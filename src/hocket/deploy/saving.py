"""A deployment between two events as plain data and tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hocket import wire
from hocket.deploy.site import job_of, plain
from hocket.deploy.ways import Out, Way

if TYPE_CHECKING:
    from hocket.deploy.engine import Deployment


def state(d: Deployment) -> dict[str, Any]:
    """All that is not on disk already."""
    outs = [{**vars(o), "job": plain(o.job)} for o in d.out.values()]
    ways = {c: {"waiting": w.waiting, "sent": w.sent, "forget": w.forget} for c, w in d.ways.items()}
    return {
        "server": d.server.state_dict(), "out": outs, "ways": ways, "t": d.t, "requests": d.requests,
        "events": d.events, "begun": d.begun, "evaluations": d.evaluations.state_dict(),
        "ledger": d.ledger.state_dict(), "norms": d.norms.seen,
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
    d.origin = d.now() - saved["t"]
    d.missed, d.patient = set(d.server.online), d.t + d.rejoin
    d.away = dict.fromkeys(d.ways, d.patient)
    for c in d.server.clients:
        d.server.left(c)
