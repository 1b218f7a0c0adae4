"""The long-lived process of a site: model, optimizer and data stay warm between messages.

It listens on a Unix socket in the site's folder (mode 0600, with a key that only its owner can read) and answers JSON:

    open  {run, recipe, client}            loads model and this site's rows  -> {rows, version}
    take  {run, asks, forget}              queues jobs; their packets are files here -> {}
    answer {run, job, timeout}             waits for an update               -> {told, packet, size} or {wait}

A question that comes again gets the same answer. Rows, paths and the site's data section never leave this process.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import tomllib
from collections.abc import Callable, Mapping
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from hocket.deploy import logs
from hocket.deploy.courier import KEY, SOCKET, hear, own, plain, say
from hocket.deploy.site import Lost, Site, job_of
from hocket.errors import HocketError, StoreError

log = logging.getLogger(__name__)

Opener = Callable[[str, int, Path], Site]
"""(recipe in TOML, client, folder of the run) to the site's side of it."""


class Worker:
    """Serves one site's runs, one of them at a time.

    Args:
        folder: the site's own; socket, key and a folder for each run are made in it.
        opens: how a run is opened (`hocket.deploy.sites.opener` is the real one).
    """

    def __init__(self, folder: Path, opens: Opener) -> None:
        self.folder, self._opens = folder, opens
        own(folder)
        self.run: str | None = None
        self.site: Site | None = None
        self._opening = threading.Lock()
        address = folder / SOCKET
        if len(os.fsencode(address)) > 100:
            raise StoreError(f"'{address}' is too long a path for a socket; choose a folder with a shorter one")
        key = folder / KEY
        if not key.exists():
            descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as f:
                f.write(secrets.token_bytes(32))
        address.unlink(missing_ok=True)
        before = os.umask(0o177)  # there is no moment in which others could open the socket
        try:
            self._listener = Listener(str(address), "AF_UNIX", backlog=16, authkey=key.read_bytes())
        finally:
            os.umask(before)
        self._closed = False

    def serve(self) -> None:
        """Answer until `close`."""
        while not self._closed:
            try:
                line = self._listener.accept()
            except Exception as error:  # a caller without the key, or one that hung up
                if not self._closed:
                    logs.say(log, "caller refused", logging.WARNING, reason=str(error))
                continue
            threading.Thread(target=self._talk, args=(line,), daemon=True).start()

    def close(self) -> None:
        """Stop listening; a job under way is finished."""
        self._closed = True
        self._listener.close()
        if self.site is not None:
            self.site.close()

    def _talk(self, line: Any) -> None:
        with line:
            try:
                say(line, self.answer(hear(line)))
            except (OSError, EOFError, ValueError) as error:  # the courier died: it will ask again
                log.info("a courier went away: %s", error)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What a question is answered; failures are answers too: `failed` is `lost` or `job` (see `Failed`)."""
        try:
            if question.get("op") == "open":
                return self._open(question)
            site = self.site
            if site is None or question.get("run") != self.run:
                return {"failed": "lost", "reason": "this run is not open here"}
            if question.get("op") == "take":
                site.forget(*question["forget"])
                for job in map(job_of, question["asks"]):
                    path = self.path(str(question["run"]), job.id)
                    if path.exists():
                        size = path.stat().st_size
                        try:
                            site.take(job, path)
                        finally:  # what could not be taken is sent anew
                            path.unlink(missing_ok=True)
                        logs.say(log, "job given", job=job.id, turn=job.turn, version=job.version, bytes=size)
                    elif not site.has(job):
                        raise Lost(f"the packet of job {job.id} is not here")
                return {}
            if question.get("op") == "answer":
                found = site.answer(int(question["job"]), float(question["timeout"]))
                if found is None:
                    return {"wait": True}
                size, told = found[1].stat().st_size, found[0]
                took = {k: round(float(told[k]), 3) for k in ("waited", "computed", "kept") if k in told}
                logs.say(log, "answer", job=int(question["job"]), turn=told.get("turn"), bytes=size, **took)
                return {"told": told, "packet": str(found[1]), "size": size}
            return {"failed": "job", "reason": f"unknown question '{question.get('op')}'"}
        except Lost as error:
            return self._failed("lost", str(error))
        except HocketError as error:
            return self._failed("job", str(error))
        except (KeyError, TypeError, ValueError) as error:
            return self._failed("job", f"cannot be read: {type(error).__name__}: {error}")
        except OSError as error:  # the disk is full, a file is being replaced: it may go better in a while
            log.exception("'%s' failed", question.get("op"))
            return self._failed("link", plain(error))
        except Exception as error:  # whatever it is, the server must hear of it instead of asking for ever
            log.exception("'%s' failed", question.get("op"))
            return self._failed("job", plain(error))

    def _failed(self, kind: str, reason: str) -> dict[str, Any]:
        logs.say(log, "failed", logging.WARNING, kind=kind, reason=reason)
        return {"failed": kind, "reason": reason}

    def path(self, run: str, job: int) -> Path:
        """Where a job's download is put."""
        return self.folder / "runs" / _safe(run) / f"down-{job}.hkt"

    def _open(self, question: Mapping[str, Any]) -> dict[str, Any]:
        run, recipe = str(question["run"]), str(question["recipe"])
        with self._opening:
            if self.run != run or self.site is None:
                tomllib.loads(recipe)
                if self.site is not None:
                    self.site.close()
                self.site = self._opens(recipe, int(question["client"]), self.folder / "runs" / _safe(run))
                self.run = run
                logs.say(log, "opened", run=run, rows=self.site.client.rows)
            return {"rows": self.site.client.rows, "version": self.site.version}


def _safe(run: str) -> str:
    if not run or not all(c.isalnum() or c in "-_" for c in run):
        raise StoreError(f"'{run}' is no name of a run")
    return run
