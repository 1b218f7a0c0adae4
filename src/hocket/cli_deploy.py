"""Commands for machines of different owners."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hocket.errors import HocketError

LogForm = Annotated[str | None, typer.Option("--log", help="json or text; default text on a terminal, else json.")]
deploy_app = typer.Typer(help="Machines of different owners.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    """Add `serve`, `join`, `replay` and `deploy` to the command line."""
    app.command()(serve)
    app.command()(join)
    app.command()(replay)
    app.add_typer(deploy_app, name="deploy")


@deploy_app.command("init")
def init(
    out: Annotated[Path, typer.Argument(help="Folder to make.", metavar="OUT")],
    sites: Annotated[str, typer.Option(help="Names of the sites: a,b,c.")],
    host: Annotated[str, typer.Option(help="Name or address at which sites reach the server.")],
    port: Annotated[int, typer.Option(help="Port at which they do.")] = 9443,
    inner: Annotated[int, typer.Option(help="Port of the SuperLink on the server's loopback interface.")] = 18000,
) -> None:
    """Write certificates, keys, a recipe, the sites' files, the proxy's configuration and service units."""
    from hocket.deploy import init as files

    made = files.init(out, [s.strip() for s in sites.split(",")], host, port, inner)
    typer.echo(
        f"{made}/server stays here; hand each folder of {made}/sites to its site, over a safe way: keys are in it"
    )


@deploy_app.command("app")
def app_folder(out: Annotated[Path, typer.Argument(help="Folder to make.", metavar="OUT")]) -> None:
    """Write the Flower app that starts the installed hocket, for Flower's own commands."""
    from hocket.deploy import init as files

    typer.echo(str(files.app(out)))


def join(
    site: Annotated[Path, typer.Argument(help="The site's file.", metavar="SITE")],
    folder: Annotated[Path | None, typer.Option(help="The site's own folder; default: beside its file.")] = None,
    log: LogForm = None,
) -> None:
    """Take part as a site: a worker with this site's rows, and a SuperNode; both are kept running."""
    from hocket.deploy import launch, logs
    from hocket.deploy.sites import read
    from hocket.run import Stop

    logs.begin(log)
    described = read(site)
    if "superlink" not in described:
        raise HocketError(f"site file '{site}': superlink: missing; the server's address as host:port")
    stop = Stop()
    home = folder or site.parent / f"{described['name']}-site"
    with stop.listening():
        launch.keep(launch.site(site, described, home.resolve()), stop)


def serve(
    recipe: Annotated[Path, typer.Argument(help="Recipe in TOML.", metavar="RECIPE")],
    out: Annotated[Path, typer.Option(help="The run's folder; one that is there is gone on with.")],
    server: Annotated[Path | None, typer.Option(help="Folder that `deploy init` made: certificates and keys.")] = None,
    port: Annotated[int, typer.Option(help="Port for sites.")] = 9443,
    inner: Annotated[int, typer.Option(help="Port of the SuperLink, on the loopback interface.")] = 18000,
    host: Annotated[str, typer.Option(help="Interface for sites.")] = "0.0.0.0",
    metrics: Annotated[int | None, typer.Option(help="Port of Prometheus metrics, on the loopback interface.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="SuperLink without a database: faster with large models.")
    ] = False,
    log: LogForm = None,
) -> None:
    """Run a recipe with sites: a SuperLink, the gate before it, and the run; goes on after any of them was killed."""
    from hocket import recipe as recipes
    from hocket.deploy import init as files
    from hocket.deploy import launch, logs
    from hocket.deploy.serving import check
    from hocket.run import Stop

    logs.begin(log)
    check(recipes.load(recipe))
    home = out.resolve() / "hub"
    if server is None and host not in ("127.0.0.1", "localhost"):
        raise HocketError(
            "--server: without certificates and keys only this machine can take part; use --host 127.0.0.1"
        )
    nodes = server.resolve() / "nodes" if server else None
    hub = launch.Hub(home, port, inner, host, server.resolve() if server else None, nodes, memory=memory)
    app = files.app(home / "app")
    processes, stop = hub.processes(), Stop()
    scraped = None
    if metrics is not None:
        from hocket.deploy.metrics import Exporter

        scraped = Exporter(out, metrics)
    with stop.listening():
        try:
            for p in processes:
                p.start()
            hub.connect()
            launch.drive(hub, processes, app, recipe, out, stop)
        finally:
            for p in reversed(processes):
                p.stop()
            if scraped:
                scraped.close()
    if stop():
        typer.echo("stopped; go on with the same command", err=True)
        raise typer.Exit(130)
    from hocket import report

    typer.echo(f"report: {report.build([out], out / 'report.html')}")


def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a deployed run.", metavar="RUN")],
    sites: Annotated[list[Path], typer.Argument(help="Each site's file, its rows in reach.", metavar="SITE...")],
) -> None:
    """Do a deployed run again from its ledger, every update in the order in which it came, and compare the models."""
    from hocket.deploy import replay as record

    found = record.replay(run, sites)
    if found.recorded != found.replayed:
        raise HocketError(
            f"version {found.version}: the run's model has hash {found.recorded}, the replayed one {found.replayed}"
        )
    typer.echo(f"version {found.version}, {found.recorded}: the same model")
