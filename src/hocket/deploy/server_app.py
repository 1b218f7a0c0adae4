"""The server's Flower app: a recipe, a run folder, and a link over the grid."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any


def make() -> Any:
    """The app, for the three lines that Flower ships. Its run configuration has `recipe` and `folder`."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    from hocket import recipe as recipes
    from hocket.deploy.flower import FlowerLink
    from hocket.deploy.serving import serve
    from hocket.deploy.sites import shared

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        logging.getLogger("hocket").setLevel(logging.INFO)
        recipe = recipes.load(Path(str(context.run_config["recipe"])))
        folder = Path(str(context.run_config["folder"]))
        d = recipe.deployment
        serve(
            recipe, folder,
            lambda path: FlowerLink(
                grid, f"{folder.name}-{recipe.hash[:8]}", shared(recipe), d.sites, path / "arriving",
                part=int(d.part_mb * 1e6), patience=d.patience,
            ),
        )  # fmt: skip

    return app
