"""The server's Flower app: a recipe, a run folder, and a link over the grid."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hocket.errors import HocketError, Interrupted

log = logging.getLogger(__name__)


def make() -> Any:
    """The app. Its run configuration has `recipe` and `folder`."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    from hocket import recipe as recipes
    from hocket.deploy import logs
    from hocket.deploy.flower import FlowerLink
    from hocket.deploy.serving import name, serve
    from hocket.deploy.sites import shared

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        folder = Path(str(context.run_config["folder"]))
        folder.mkdir(parents=True, exist_ok=True)
        logs.into(folder / "log.jsonl")
        try:
            recipe = recipes.load(Path(str(context.run_config["recipe"])))
            d = recipe.deployment
            serve(
                recipe, folder,
                lambda path: FlowerLink(
                    grid, name(path, recipe), shared(recipe), d.sites, path / "arriving",
                    part=int(d.part_mb * 1e6), patience=d.patience,
                ),
                logs.telling(d.sites),
            )  # fmt: skip
        except Interrupted:
            raise
        except Exception as error:  # Flower's logs do not keep it where anybody looks
            expected = isinstance(error, HocketError)
            log.error(
                "run failed",
                exc_info=not expected,
                extra={"fields": {"kind": type(error).__name__, "reason": str(error)}},
            )
            raise

    return app


app = make()
