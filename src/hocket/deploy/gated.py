"""The gate as a process: `python -m hocket.deploy.gated HOST PORT INNER CERTIFICATES`."""

from __future__ import annotations

import sys
from pathlib import Path

from hocket.deploy.gate import serve


def main() -> None:
    host, port, inner, folder = sys.argv[1:5]
    c = Path(folder) if folder else None
    behind = f"{'https' if c else 'http'}://127.0.0.1:{inner}"
    serve(behind, host, int(port), c / "ca.crt" if c else None, (c / "server.pem", c / "server.key") if c else None)


if __name__ == "__main__":
    main()
