"""A site's worker as a process: `python -m hocket.deploy.work SITE.toml FOLDER`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from hocket.deploy import logs
from hocket.deploy.sites import opener, read
from hocket.deploy.worker import Worker


def main() -> None:
    logs.begin()
    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    worker = Worker(folder, opener(read(file), file.parent))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker.serve()


if __name__ == "__main__":
    main()
