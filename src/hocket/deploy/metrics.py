"""A run's ledger as Prometheus metrics, on the loopback interface (extra `prometheus`).

The server's supervisor reads the ledger at each scrape, so metrics go on when the run's own process is started again.
What is counted anew after a checkpoint goes down a little, which Prometheus takes for a restart, as it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hocket.deploy.logs import say
from hocket.errors import HocketError, RunError, need
from hocket.live import KINDS, Follower

if TYPE_CHECKING:
    from prometheus_client import Metric


log = logging.getLogger(__name__)


class Exporter:
    """Answers scrapes until it is closed.

    Args:
        folder: of the run; it need not be there yet.
        port: to listen on; 0: one that is free, in `port`.

    Raises:
        HocketError: prometheus-client is not installed.
        RunError: the port is taken.
    """

    def __init__(self, folder: Path, port: int) -> None:
        library = need("prometheus_client", "prometheus")
        self.folder, self._told, self._lock = folder, "", threading.Lock()
        self._run: Follower | None = None
        registry = library.CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = library.start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise RunError(f"--metrics {port}: {error.strerror}; choose another port") from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def describe(self) -> list[Any]:
        """Nothing: the library would collect before there is a run."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            run = self._read()
            up = GaugeMetricFamily("hocket_run_up", "1 once the run has a ledger that can be read")
            up.add_metric([], float(run is not None))
            yield up
            if run is None:
                return
            s = run.state
            for name, value, text in (
                ("turn", s.version, "aggregations that were made"),
                ("turns", run.turns, "aggregations of the whole run"),
                ("ended", s.ended, "1 when the run has ended"),
                ("staleness", s.staleness, "versions that updates were behind, mean of the last aggregation"),
                ("staleness_most", s.stalest, "the same, the most"),
                ("training_loss", s.losses[-1] if s.losses else None, "of the last aggregation's updates"),
                ("heldout_loss", s.held[-1][1] if s.held else None, "of the last evaluation"),
                ("run_seconds", s.t, "second of the run of the ledger's last row"),
                ("seconds_since_answer", _since(run), "seconds since the last update came"),
                ("sites", len(s.clients), "sites of the run"),
                ("sites_joined", sum(c.state != "away" for c in s.clients.values()), "sites that are there"),
            ):
                if value is not None:
                    gauge = GaugeMetricFamily(f"hocket_{name}", text)
                    gauge.add_metric([], float(value))
                    yield gauge
            updates = CounterMetricFamily("hocket_updates", "updates that were aggregated")
            updates.add_metric([], s.updates)
            moved = CounterMetricFamily("hocket_bytes", "bytes of packets", labels=["site", "direction"])
            here = GaugeMetricFamily("hocket_site_joined", "1 while a site is there", labels=["site"])
            for c in s.clients.values():
                moved.add_metric([c.name, "down"], c.down)
                moved.add_metric([c.name, "up"], c.up)
                here.add_metric([c.name], float(c.state != "away"))
            refused = CounterMetricFamily("hocket_refusals", "jobs lost or refused", labels=["reason"])
            for kind in (*KINDS, "failed"):
                refused.add_metric([kind], s.refusals[kind])
            yield from (updates, moved, here, refused)

    def _read(self) -> Follower | None:
        try:
            self._run = self._run or Follower(self.folder)
            self._run.refresh()
        except (HocketError, OSError) as error:  # not there yet, or not readable just now
            if str(error) != self._told:
                self._told = str(error)
                say(log, "no metrics", reason=self._told)
            return None
        return self._run if self._run.begun else None


def _since(run: Follower) -> float | None:
    s = run.state
    return None if s.heard is None else s.t - s.heard + run.silence
