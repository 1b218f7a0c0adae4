"""A site's Flower processes, held to the code that is installed there: `python -P -m hocket.deploy.guard COMMAND`.

Flower installs the app that a SuperLink names on every node and imports it: whoever controls the SuperLink would
control code at the sites. `hocket join` lets its SuperNode find nothing but this in PATH. It starts the task process
of a client app alone, and there

* a module is imported from where Python found modules before Flower began, and from nowhere else, so an app must name
  `hocket.deploy.client_app:app`; anything else is an `ImportError` that the server is told;
* no process is started, and no file is written outside Flower's home, with a temporary folder in it, and the site's
  runs (an app's name and version, which Flower makes a path of, can hold `..`): not where modules are imported from,
  and not where these commands lie.

The second is an audit hook: it keeps Flower's own code, fed with a stranger's data, in its place. It would not hold
code that is let in; the first lets none in.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

COMMANDS = ("flower-superexec", "flwr-clientapp")
"""What a site runs of Flower's, beside its SuperNode: what asks for tasks, and the client app's process."""
STARTS = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(PermissionError):
    """What a stranger's app would have the site's processes do."""


class Installed(MetaPathFinder):
    """Asks the other finders, and refuses what they find outside `roots` or below `strange`.

    Args:
        roots: folders of installed modules.
        strange: folders that an app can have files in, wherever they lie.
    """

    def __init__(self, roots: Iterable[str], strange: Iterable[str]) -> None:
        self.roots, self.strange = [os.path.realpath(r) for r in roots], [os.path.realpath(s) for s in strange]

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """The module's spec. Raises `ImportError` if it is not installed here."""
        if name.rpartition(".")[2] == "__main__":
            raise ImportError(f"this site imports no program ('{name}')")
        for finder in sys.meta_path:
            found = finder.find_spec(name, path, target) if finder is not self else None
            if found is None:
                continue
            places = [found.origin] if found.has_location and found.origin else []
            for place in [*places, *(found.submodule_search_locations or [])]:
                if not within(place, self.roots) or within(place, self.strange):
                    raise ImportError(
                        f"this site runs only code that is installed on it, and '{name}' came with the run's app; "
                        f"an app for hocket names hocket.deploy.client_app:app and brings none (`hocket deploy app`)"
                    )
            return found
        return None


def within(path: str, roots: Sequence[str]) -> bool:
    """Whether a path, with its links followed, lies in one of some folders."""
    real = os.path.realpath(path)
    return any(real == r or real.startswith(r.rstrip(os.sep) + os.sep) for r in roots)


def confine(roots: Iterable[str]) -> None:
    """From now on this process starts no other, and makes or writes files in `roots` only; for good."""
    kept = [os.path.realpath(r) for r in roots]

    def look(event: str, args: tuple[Any, ...]) -> None:
        if event in STARTS:
            raise Refused(f"{event}: a site's client app starts no process")
        targets: tuple[Any, ...] = ()
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool((flags or 0) & WRITES)
            targets = (path,) if writes else ()
        elif event == "os.mkdir":
            targets = (args[0],) if args[2] == -1 else ()
        elif event in ("os.rename", "os.link", "os.symlink"):
            targets = (args[1],)
        for target in targets:
            if isinstance(target, (str, bytes, os.PathLike)) and not within(os.fsdecode(target), kept):
                raise Refused(f"{event} '{os.fsdecode(target)}': outside the site's folder")

    sys.addaudithook(look)


def hold(home: str, site: str) -> None:
    """From now on this process is what a site's client app may be; for good.

    Args:
        home: Flower's, where it puts apps.
        site: the site's folder.

    Raises:
        SystemExit: modules are imported from a folder that an app can write to.
    """
    import hocket
    import hocket.deploy.client_app  # before anything else could bring one of that name

    temporary = os.path.join(home, "tmp")
    os.makedirs(temporary, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = temporary  # that of the machine may well hold modules
    roots = [p for p in sys.path if p] + [str(Path(p).parent) for p in hocket.__path__]
    strange = [os.path.realpath(home), os.path.realpath(site)]
    for root in roots:
        if within(root, strange):
            sys.exit(
                f"hocket: '{root}', where Python looks for modules, lies in a folder that a run's app can write to; "
                f"give the site a folder that holds no installed packages (`hocket join --folder`)"
            )
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Installed(roots, strange))
    confine([home, os.path.join(site, "runs"), os.devnull])


def commands(folder: Path) -> Path:
    """A folder for PATH that holds what a site's SuperNode may start, each by way of this module."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    named = {p.name for p in Path(sys.executable).parent.glob("flwr-*")} | set(COMMANDS)
    for name in sorted(named):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m hocket.deploy.guard {name} "$@"\n')
        (folder / name).chmod(0o700)
    return folder


def main() -> None:
    """Run one of Flower's commands as they are installed."""
    name = sys.argv[1]
    sys.argv = [name, *sys.argv[2:]]
    if name not in COMMANDS:
        sys.exit(f"hocket: this site runs client apps of hocket's, and no {name}")
    (command,) = entry_points(group="console_scripts", name=name)
    start = command.load()
    if name == "flwr-clientapp":
        hold(os.environ["FLWR_HOME"], os.environ["HOCKET_SITE"])
    start()


if __name__ == "__main__":
    main()
