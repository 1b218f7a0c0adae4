"""Run studies, each run once and in its own folder, and say which differences are larger than chance.

A run's folder is named by the hash of its recipe: asked again, finished runs are read and unfinished ones resumed, so a
comparison that was stopped goes on with the same command. Rates are chosen first, each on its own data (`Study.tune`).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hocket.errors import HocketError, Interrupted, RecipeError, RunError
from hocket.recipe import Recipe, parse
from hocket.report.tables import first
from hocket.results import paired
from hocket.study import Study, Variant

Say = Callable[[str], None]
SCORES = ("accuracy", "f1", "gsm8k", "rouge_l", "peak_memory")
"""What a result has the mean of where every run has it; memory in bytes, of the client that needed most."""


@dataclass
class Chosen:
    """A variant with its rate: what each rate gave in tuning (nothing if there was no choice)."""

    variant: Variant
    rate: float | None
    tuned: dict[float, float] = field(default_factory=dict)


def compare(studies: Sequence[Study], out: Path, jobs: int = 1, say: Say = print) -> dict[str, dict[str, Any]]:
    """Run what is missing and sum up; results by study.

    Args:
        out: run folders go to `out`/runs.
        jobs: runs at the same time, each with an equal share of the cores.

    Raises:
        RecipeError: a variant has no rate, and none of its name has one.
        HocketError: a run failed; those finished are kept.
        Interrupted: stopped; the same command goes on.
    """
    known = {v.name for s in studies for v in s.variant if v.rates}
    for study in studies:
        for v in study.variant:
            if not v.rates and (v.like or v.name) not in known:
                raise RecipeError(
                    f"study '{study.study}', variant '{v.name}': no rates, and no '{v.like or v.name}' has"
                )
    runner = Runner(out / "runs", jobs, say)
    try:
        runner.all([r for s in studies for v in s.variant for r in s.tuning(v).values()], "tuning")
        tuned = {s.study: {v.name: _tuned(s, v, runner) for v in s.variant if v.rates} for s in studies}
        elsewhere = {name: c for s in reversed(studies) for name, c in tuned[s.study].items()}
        chosen = {s.study: {v.name: _choose(v, elsewhere | tuned[s.study]) for v in s.variant} for s in studies}
        final = [r for s in studies for c in chosen[s.study].values() for r in s.runs(c.variant, c.rate).values()]
        runner.all(final, "runs")
    except KeyboardInterrupt as error:
        runner.stop()
        raise Interrupted from error
    finally:
        runner.close()
    return {s.study: summary(s, chosen[s.study], runner) for s in studies}


def _tuned(study: Study, variant: Variant, runner: Runner) -> Chosen:
    """A variant that has rates, with the best of them."""
    tuned = {rate: runner.result(recipe)["loss"] for rate, recipe in study.tuning(variant).items()}
    best = min(tuned, key=lambda r: (tuned[r], r)) if tuned else variant.rates[0]
    if tuned and best in (min(tuned), max(tuned)):
        runner.say(f"{study.study}, {variant.name}: {best:g} is best and at the edge of its rates; try further ones")
    return Chosen(variant, best, tuned)


def _choose(variant: Variant, tuned: Mapping[str, Chosen]) -> Chosen:
    """A variant's own choice, or that of the variant it is like (in its own study first)."""
    like = tuned[variant.like or variant.name]
    return like if variant.rates else Chosen(variant, like.rate)


class Runner:
    """Runs recipes, several at a time, each in a process that lives on for the next one."""

    def __init__(self, folder: Path, jobs: int, say: Say) -> None:
        self.folder, self.say = folder, say
        threads = max(1, (os.cpu_count() or 1) // jobs)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context, initializer=_enter, initargs=(threads,))
        self._done: dict[str, dict[str, Any]] = {}

    def path(self, recipe: Recipe) -> Path:
        """Where a recipe's run lives."""
        return self.folder / recipe.hash

    def result(self, recipe: Recipe) -> dict[str, Any]:
        """What a finished run came to."""
        return self._done[recipe.hash]

    def all(self, recipes: Sequence[Recipe], what: str) -> None:
        """Run what has no result yet."""
        missing = {r.hash: r for r in recipes if r.hash not in self._done}
        futures = {self._pool.submit(_perform, r.to_toml(), str(self.path(r))): r for r in missing.values()}
        for n, future in enumerate(as_completed(futures), 1):
            recipe = futures[future]
            try:
                done = self._done[recipe.hash] = future.result()
            except BrokenProcessPool as error:
                time.sleep(1)  # Ctrl-C reaches the whole group, workers perhaps first: then this is what it interrupts
                raise RunError(
                    "a run's process died (killed, or out of memory): use fewer --jobs; the same command goes on"
                ) from error
            except HocketError as error:
                where = f"{recipe.name}, rate {recipe.training.lr:g}, seed {recipe.seed} ({self.path(recipe)})"
                raise RunError(f"{where}: {error}") from error
            wall = f"{done['wall_seconds']:.0f} s" if done["ran"] else "was there"
            self.say(
                f"[{n}/{len(futures)} {what}] {recipe.name}, rate {recipe.training.lr:g}, seed {recipe.seed}: "
                f"held-out loss {done['loss']:.4f} ({wall})"
            )

    def stop(self) -> None:
        """End the processes. A run that hears of it writes a checkpoint first; one that does not end is killed.

        Futures are left alone: a broken pool chokes on cancelled ones and then forgets the processes it still has.
        """
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(60)
            worker.kill()

    def close(self) -> None:
        """Let the processes go, after what they are doing."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _enter(threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _perform(toml: str, folder: str) -> dict[str, Any]:
    """Start, resume or just read one run; in a worker process."""
    import tomllib

    from hocket import report, run

    path = Path(folder)
    ran = not ((path / "manifest.json").exists() and (path / "ledger.jsonl").exists() and report.read(path).finished)
    if ran:
        try:
            if (path / "recipe.toml").exists():
                run.resume(path)
            else:
                run.start(parse(tomllib.loads(toml)), path)
        except Interrupted:
            os._exit(128 + signal.SIGTERM)  # this process would take the next run, and only one signal is sent
        for spent in ("checkpoint", "spool"):  # only what can be read off a run is kept, not its model
            shutil.rmtree(path / spent, ignore_errors=True)
    found = report.read(path)
    if not found.evals:
        raise HocketError(f"'{path}' has no evaluation")
    last = found.evals[-1]
    s = found.summary()
    return {
        "ran": ran, "git": found.manifest["git"], "loss": _number(last["loss"]), "start_loss": s["start_loss"],
        "personal": found.personal, "clients_loss": last["loss"] if found.personal else last.get("clients_loss"),
        "clients_accuracy": last.get("accuracy") if found.personal else last.get("clients_accuracy"),
        "clients_n": last["n"] if found.personal else last.get("clients_n"),
        "heldout_rows": last["n"], "virtual_seconds": s["virtual_seconds"],
        "up_bytes": s["up_bytes"], "down_bytes": s["down_bytes"], "catch_up_bytes": found.steps[-1].get("catch_up", 0),
        "local_steps": int(sum(c.get("steps", 0) for c in found.clients.values())), "turns": s["versions"],
        "curve": found.curve("t"), "moved": [x for x, _ in found.curve("bytes")], "clients": last.get("clients"),
        "groups": last.get("groups"),
        "jobs": [int(c["jobs"]) for _, c in sorted(found.clients.items())],
        "wall_seconds": found.manifest["wall_seconds"], "accuracy": s["accuracy"], "gsm8k": s["gsm8k"],
        "rouge_l": s["rouge_l"],
        "peak_memory": max((m["peak"] for m in found.measured.values() if "peak" in m), default=None),
        "f1": last.get("f1"), "error": [x for _, x in found.layers("error")],
        "effective_rank": [x for _, x in found.layers("rank")],
    }  # fmt: skip


def _number(x: Any) -> float:
    return float(x) if math.isfinite(float(x)) else math.inf  # diverged: worse than anything


def summary(study: Study, chosen: Mapping[str, Chosen], runner: Runner) -> dict[str, Any]:
    """For each variant its rate, losses by seed with mean and standard deviation, and its paired difference to
    `versus`: mean, 95 % interval (Student's t over seeds) and two-sided p; times and bytes are means over seeds.
    `reached` and `reached_bytes`: for each seed, when it was first as good as `versus` was in the end.

    With a personalized method among the variants, all are held to what it can be scored on: the clients' own rows, on
    which other methods have their one model. Nobody's way there is known then, and nothing is `reached`."""
    versus = study.versus or study.variant[0].name
    runs = {n: {s: runner.result(r) for s, r in study.runs(c.variant, c.rate).items()} for n, c in chosen.items()}
    own = {n: any(r.get("personal") for r in rs.values()) for n, rs in runs.items()}
    if any(own.values()):
        runs = {n: {s: _on_own_rows(r) for s, r in rs.items()} for n, rs in runs.items()}
    base = [r["start_loss"] for rs in runs.values() for r in rs.values() if r["start_loss"] is not None]
    goal = {s: r["loss"] for s, r in runs[versus].items()}
    rows = {}
    for name, by_seed in runs.items():
        losses = [by_seed[s]["loss"] for s in study.seeds]
        mean = lambda key, rs=by_seed: statistics.fmean(r[key] for r in rs.values())  # noqa: E731
        rows[name] = {
            "rate": chosen[name].rate,
            "personal": own[name],
            "tuning": {f"{rate:g}": loss for rate, loss in chosen[name].tuned.items()},
            "losses": losses,
            "loss": statistics.fmean(losses),
            "sd": statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None,
            "difference": paired(losses, [runs[versus][s]["loss"] for s in study.seeds]) if name != versus else None,
            **{k: mean(k) for k in SCORES if all(r[k] is not None for r in by_seed.values())},
            **{k: mean(k) for k in ("virtual_seconds", "up_bytes", "down_bytes", "catch_up_bytes", "wall_seconds")},
            "turns": next(iter(by_seed.values()))["turns"],
            "local_steps": mean("local_steps"),
            "curves": [by_seed[s]["curve"] for s in study.seeds],
            **{k: [by_seed[s][k] for s in study.seeds] for k in ("moved", "clients", "groups", "jobs")},
            **{k: [by_seed[s][k] for s in study.seeds] for k in ("error", "effective_rank")},
            "client_memory": client_memory(next(iter(study.runs(chosen[name].variant, chosen[name].rate).values()))),
            "reached": [first(by_seed[s]["curve"], goal[s]) for s in study.seeds],
            "reached_bytes": [
                first([(x, y) for x, (_, y) in zip(by_seed[s]["moved"], by_seed[s]["curve"], strict=True)], goal[s])
                for s in study.seeds
            ],
        }
    everything = [r for by_seed in runs.values() for r in by_seed.values()]
    return {
        "study": study.study, "git": " ".join(sorted({str(r["git"]) for r in everything})), "seeds": study.seeds,
        "versus": versus, "on_own_rows": any(own.values()),
        "heldout_rows": sorted({r["heldout_rows"] for r in everything}),
        "base_loss": statistics.fmean(base) if base else None, "variants": rows,
    }  # fmt: skip


def _on_own_rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """A run's result with its scores on the clients' own held-out rows in place of those on the common ones."""
    if result["clients_loss"] is None:
        raise RecipeError("data.client_heldout: a personalized method is compared on clients' own rows; set it for all")
    scores = {"loss": _number(result["clients_loss"]), "accuracy": result["clients_accuracy"]}
    unknown: dict[str, Any] = {"f1": None, "gsm8k": None, "rouge_l": None, "start_loss": None, "curve": [], "moved": []}
    return {**result, **scores, **unknown, "heldout_rows": result["clients_n"]}


def client_memory(recipe: Recipe) -> list[int]:
    """Bytes that the least and the most demanding client need, by the plan."""
    from hocket.plan import plan

    totals = [c["memory"].total for c in plan(recipe, [recipe.data.min_rows] * recipe.clients.count)["clients"]]
    return [min(totals), max(totals)]
