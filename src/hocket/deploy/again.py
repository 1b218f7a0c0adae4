"""Jobs that a site was given and has not answered, sent once more.

They are the same jobs, so the model is that of an undisturbed run, and a site that had done one answers with that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hocket import store
from hocket.deploy.ways import Way

if TYPE_CHECKING:
    from hocket.deploy.engine import Deployment
TRIES = 5  # of jobs whose site has lost what they build on, without an update in between


def again(d: Deployment, way: Way) -> None:
    """All of a site's jobs are to be sent anew."""
    way.request, way.sent, way.waiting = None, [], way.sent + way.waiting
    for j in way.waiting:
        d.out[j].sent = None


def renew(d: Deployment, client: int, way: Way) -> bool:
    """Make a site's jobs whole, as it has lost what they build on; False if they are not all of this version."""
    outs = [d.out[j] for j in way.sent + way.waiting]
    way.renewed += 1
    if way.renewed > TRIES or any(o.abandoned or o.job.version != d.server.version for o in outs):
        return False
    again(d, way)
    for o in outs:
        packet, whole = d.outbox / f"{o.job.id}.hkt", d.server.whole(client)
        store.put(packet, lambda f, whole=whole: d.down.write(f, whole))  # type: ignore[misc]
        o.job, o.bytes = replace(o.job, since=-1), packet.stat().st_size
    return True
