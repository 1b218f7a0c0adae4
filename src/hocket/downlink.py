"""What simulated clients hold after a download, without storing a cache for each of them.

A job's payload holds all that changed since the client's version, so the rest of its cache is what every up-to-date
client has. One mirror of that, as the clients decoded it, serves them all; jobs in flight keep the tensors they need.
"""

from __future__ import annotations

from typing import Any

from hocket.codecs import Codec
from hocket.methods import Job
from hocket.server import Server
from hocket.tree import Tree


class Downlink:
    """The server-to-client direction of a simulation.

    Args:
        codec: encodes every payload; the client computes with what it decodes.
        server: its start model is what preloaded clients hold.
    """

    def __init__(self, codec: Codec, server: Server) -> None:
        self.codec = codec
        self._mirror: Tree = dict(server.state.get("params", {}))
        self._stamp: dict[str, int] = {}  # the version in which each of the mirror's tensors changed
        self._shared: Tree | None = None  # one dict for all jobs until the mirror changes

    def send(self, job: Job, server: Server) -> tuple[Tree, int]:
        """The view the client has once it holds the payload, and the encoded payload's bytes."""
        if self.codec.lossless:  # the tensors that were sent are the tensors that arrive: no copy
            decoded, size = job.payload, self.codec.size(job.payload)
        else:
            blob = self.codec.encode(job.payload)
            packet = self.codec.decode(blob)
            decoded, size = {k: packet[k] for k in packet}, len(blob)
        own: Tree = {}
        params = server.state.get("params", {})
        for k, sent in job.payload.items():
            version = server.changed.get(k, 0)
            if sent is not params.get(k):
                own[k] = decoded[k]  # made for this client alone
            elif self._stamp.get(k, -1) != version:
                self._mirror[k], self._stamp[k], self._shared = decoded[k], version, None
        if self._shared is None:
            self._shared = dict(self._mirror)
        return (self._shared | own if own else self._shared), size

    def state_dict(self) -> dict[str, Any]:
        """The mirror."""
        return {"mirror": self._mirror, "stamp": self._stamp}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Become the downlink that `state_dict` described."""
        self._mirror, self._stamp, self._shared = saved["mirror"], saved["stamp"], None
