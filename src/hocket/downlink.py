"""What simulated clients hold after a download.

`Downlink` stores no cache for each client: a job's payload holds all that changed since the client's version, so the
rest of its cache is what every up-to-date client has. If packets arrive as they were sent, that is the server's own
view. Under a lossy codec one mirror of it, as the clients decoded it, serves them all; jobs in flight keep the tensors
they need.

`Differences` is for codecs that would ruin whole weights (low rank, sparse): with x_c what client c holds, the server
sends C(theta - x_c) for the tensors that changed since, and both sides add what was decoded to x_c, so that what was
lost is in the next difference (the server's side of EF21, https://arxiv.org/abs/2106.05203). That needs x_c for each
client: packets in the spool, on disk where they are many, never in memory. What has another shape than x_c's is
sent whole, and so is what a client gets that holds nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hocket import wire
from hocket.codecs import Codec
from hocket.flight import Flight
from hocket.methods import Job
from hocket.server import Server
from hocket.store import Spool
from hocket.tree import Tree, nbytes


@dataclass(frozen=True)
class Download:
    """What a job's client computes with, and the encoded bytes that bring it there.

    Attributes:
        view: what it computes with; None if that is in the spool, under `key`.
        bytes: of the whole payload.
        catch_up: of those, what a client that held the version before would not have had to fetch.
    """

    view: Tree | None
    bytes: int
    catch_up: int
    key: str | None = None


class Downlink:
    """The server-to-client direction of a simulation.

    Args:
        codec: encodes every payload; the client computes with what it decodes.
        server: its start model is what preloaded clients hold.
    """

    def __init__(self, codec: Codec, server: Server) -> None:
        self.codec = codec
        self._start: Tree = dict(server.state["params"]) if server.method.rebuilds else {}
        if self._start and not codec.lossless and not server.preloaded:  # clients have it from a packet like any other
            self._start = dict(codec.decode(codec.encode(self._start)))
        self._mirror: Tree = {} if codec.lossless else dict(server.state["params"])
        self._stamp: dict[str, int] = {}  # the version in which each of the mirror's tensors changed
        self._merged = 0  # the last version whose own tensors (see `Method.ship`) the mirror has
        self._shared: Tree | None = None  # one dict for all jobs until the mirror changes

    def send(self, job: Job, server: Server) -> Download:
        """The view the client has once it holds the payload, and the payload's bytes."""
        latest = server.latest(job)
        if self.codec.lossless:  # the tensors that were sent are the tensors that arrive: no copy
            arrived, size = job.payload, self.codec.size(job.payload)
        else:
            blob = self.codec.encode(job.payload)
            packet = self.codec.decode(blob)
            arrived, size = {k: packet[k] for k in packet}, len(blob)
        less = 0 if latest is None else max(0, size - self.codec.size(latest))
        return Download(self._view(job, arrived, server), size, less)

    def _view(self, job: Job, arrived: Tree, server: Server) -> Tree:
        if server.method.rebuilds:
            return server.method.load(self._start, arrived)
        params = server.state["params"]
        own = {k: arrived[k] for k, sent in job.payload.items() if k in params and sent is not params[k]}
        if self.codec.lossless:
            common = params
        else:
            self._advance({k: v for k, v in arrived.items() if k not in own}, server)
            if self._shared is None:
                self._shared = dict(self._mirror)
            common = self._shared
        # what the client holds and was not sent may be its own too, such as a cut of the start model
        cut = server.method.send(server.state | {"params": common}, server.clients[job.client], job.version)
        own = {k: v for k, v in cut.items() if k not in job.payload and v is not common.get(k)} | own
        return common | own if own else common

    def _advance(self, arrived: Tree, server: Server) -> None:
        """Bring the mirror to the server's version. A client that catches up with whole tensors is taken to hold what
        the others do, who went there step by step."""
        params, news = server.state["params"], {}
        for k, v in arrived.items():
            if k not in params:
                if int(k.partition("/")[0]) > self._merged:
                    news[k] = v
            elif self._stamp.get(k, -1) != server.changed.get(k, 0):
                news[k] = v
        if news:
            after = server.method.load(self._mirror, news)
            self._stamp |= {k: server.changed.get(k, 0) for k in after if after[k] is not self._mirror.get(k)}
            self._mirror, self._shared = after, None
        self._merged = server.version

    def state_dict(self) -> dict[str, Any]:
        """The mirror."""
        return {"start": self._start, "mirror": self._mirror, "stamp": self._stamp, "merged": self._merged}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become the downlink that `state_dict` described."""
        self._start, self._mirror, self._stamp = saved["start"], saved["mirror"], saved["stamp"]
        self._merged, self._shared = saved["merged"], None


class Differences(Downlink):
    """The server-to-client direction under a codec for differences.

    Args:
        spool: where what each client holds is kept, as `held/<client>/<job>`.
        flights: jobs under way, by id; what they start from is kept.
    """

    def __init__(self, codec: Codec, server: Server, spool: Spool, flights: Mapping[int, Flight]) -> None:
        self.codec, self.spool, self.flights = codec, spool, flights
        self._start: Tree = dict(server.state["params"])
        self._held: dict[int, dict[int, int]] = {}  # client -> version it was brought to -> the job that did

    def send(self, job: Job, server: Server) -> Download:
        """What the client has once it holds the payload, and the payload's bytes."""
        view, size = self._to(job, server)
        latest = server.latest(job)
        old = 0 if latest is None else nbytes({k: x for k, x in job.payload.items() if k not in latest})
        less = size * old // max(1, nbytes(job.payload))  # by elements: encoding once more would cost too much
        if any(t.is_meta for t in view.values()):  # a plan: shapes are no load
            return Download(view, size, less)
        return Download(None, size, less, self._keep(job, view, server))

    def _to(self, job: Job, server: Server) -> tuple[Tree, int]:
        method, since, payload = server.method, job.since, job.payload
        if since is None or since < 0:  # there is nothing to take a difference to
            return method.load({}, payload), wire.size(payload)
        client = server.clients[job.client]
        base: Mapping[str, Tensor] = self._start
        want: Mapping[str, Tensor] = method.send(server.state, client, job.version)
        planned = any(t.is_meta for t in server.state["params"].values())
        if planned and not method.rebuilds:  # shapes are not kept; what stands for them is any version's
            base = want
        elif since in self._held.get(job.client, {}) and not method.rebuilds:
            base = self.spool.get(f"held/{job.client}/{self._held[job.client][since]}")
        elif not method.rebuilds:  # of the start model it holds its own cut
            base = method.send(server.state | {"params": self._start}, client, since)
        names = [k for k in payload if k in want]
        if len(names) < len(payload):  # the method has a shorter way from version to version; here its end is sent
            names = [k for k in want if server.changed.get(k, 0) > since or k in payload]
        elif method.rebuilds:
            want = payload
        # of another shape than what it holds, where the client's rank has changed: nothing to take a difference to
        whole = {k: want[k] for k in names if k in base and base[k].shape != want[k].shape}
        names = [k for k in names if k not in whole]
        news = {k: want[k] - base[k] if want[k].is_floating_point() else want[k] for k in names}
        blob = self.codec.encode(news)
        found = self.codec.decode(blob)
        moved = {k: base[k] + found[k] if want[k].is_floating_point() else found[k] for k in names} | whole
        size = self.codec.size(news) if planned else len(blob)
        size += wire.size(whole) if whole else 0
        held = method.load({k: base[k] for k in base}, moved)
        return {k: held[k] for k in sorted(held)}, size

    def _keep(self, job: Job, view: Tree, server: Server) -> str:
        """Put what the client will hold where its next difference is taken from; forget what none can be taken to."""
        held = self._held.setdefault(job.client, {})
        key = f"held/{job.client}/{job.id}"
        before = set(held.values())
        self.spool.put(key, wire.pack(view))
        held[job.version] = job.id
        needed = {job.version, job.since, server.confirmed.get(job.client, 0)}
        self._held[job.client] = {v: j for v, j in held.items() if v in needed or j in self.flights}
        for gone in before.difference(self._held[job.client].values(), self.flights):
            self.spool.drop(f"held/{job.client}/{gone}")
        return key

    def state_dict(self) -> dict[str, Any]:
        """What clients hold, but for the spool."""
        return {"start": self._start, "held": self._held}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become the downlink that `state_dict` described."""
        self._start, self._held = saved["start"], saved["held"]


def make_downlink(codec: Codec, server: Server, spool: Spool, flights: Mapping[int, Flight]) -> Downlink:
    """The downlink that suits the codec."""
    return Differences(codec, server, spool, flights) if codec.differences else Downlink(codec, server)
