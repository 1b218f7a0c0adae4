"""What simulated clients hold after a download, without storing a cache for each of them.

A job's payload holds all that changed since the client's version, so the rest of its cache is what every up-to-date
client has. If packets arrive as they were sent, that is the server's own view. Under a lossy codec one mirror of it, as
the clients decoded it, serves them all; jobs in flight keep the tensors they need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hocket.codecs import Codec
from hocket.methods import Job
from hocket.server import Server
from hocket.tree import Tree


@dataclass(frozen=True)
class Download:
    """What a job's client computes with, and the encoded bytes that bring it there.

    Attributes:
        bytes: of the whole payload.
        catch_up: of those, what a client that held the version before would not have had to fetch.
    """

    view: Tree
    bytes: int
    catch_up: int


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
            return params | own if own else params
        self._advance({k: v for k, v in arrived.items() if k not in own}, server)
        if self._shared is None:
            self._shared = dict(self._mirror)
        return self._shared | own if own else self._shared

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
