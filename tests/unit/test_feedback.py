"""FedKRSO with feedback: exact means of weights, and the outputs that coordinates point out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fedkrso import TARGETS, data, exact
from worlds import collate, language, tokens

from hocket import plan as plans
from hocket import run
from hocket.errors import RecipeError
from hocket.export import export
from hocket.methods import Local, Update, method
from hocket.methods.feedback import TURN
from hocket.methods.lora import BASE, A, B, modules
from hocket.models import load
from hocket.recipe import parse
from hocket.tree import Tree, nbytes


def spec(arch: str = "llama", **more: Any) -> dict[str, Any]:
    return {"name": "fedkrso-feedback", "rank": 2, "targets": TARGETS[arch], **more}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_step_is_fedavg_of_the_clients_weights(arch: str, optimizer: str) -> None:
    w = exact(arch, spec(arch), 4, optimizer=optimizer, lr=0.5 if optimizer == "sgd" else 1e-2)
    steps, view, seen = w.trainer._steps, w.trainer.view, {}

    def noting(local: Local, *more: Any) -> None:
        steps(local, *more)
        here = {k: view.logical(k).detach() for k in view.params}
        seen[local.client, local.turn] = {m + BASE: here[m + BASE] + here[m + B] @ here[m + A] for m in modules(here)}

    w.trainer._steps = noting
    w.run()
    for turn in range(4):
        for k in (k for k in w.final if k.endswith(BASE)):
            want = sum(seen[c, turn][k] * (3 + c) / 12 for c in range(3))
            after = w.iterates[turn + 1][k]
            assert float((after - want).abs().max()) < 1e-14
            assert float((after - w.iterates[turn][k]).abs().max()) > 1e-6


def test_turns_alternate_and_q_spans_what_was_added() -> None:
    w = exact("llama", spec(), 3, lr=0.5)
    states = [dict(w.simulation.server.state["params"])]
    step = w.simulation.server.step

    def stepping() -> Any:
        record = step()
        if record:
            states.append(dict(w.simulation.server.state["params"]))
        return record

    w.simulation.server.step = stepping  # type: ignore[method-assign]
    w.run()
    for m in modules(states[0]):
        first, second, third = states[:3]
        assert not first[m + B].any()
        assert not second[m + A].any()
        q = second[m + B] / (len(second[m + B]) / 2) ** 0.5
        assert torch.allclose(q.T @ q, torch.eye(2, dtype=q.dtype), atol=1e-12)
        added = second[m + BASE] - first[m + BASE]
        assert float((added - q @ (q.T @ added)).norm()) < 1e-12 * float(added.norm())  # Q spans all of it
        along = third[m + BASE] - second[m + BASE]
        assert float((along - q @ (q.T @ along)).norm()) < 1e-12 * float(along.norm())  # and the next step is in Q
        assert not third[m + B].any()
        assert not torch.equal(third[m + A], first[m + A])


def test_found_outputs_hold_more_of_a_gradient_than_random_inputs() -> None:
    """A gradient of fast falling spectrum, 1/k^2: two random rows hold 2/n of it, two outputs nearly all."""
    g = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(60, 60, generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(80, 60, generator=g, dtype=torch.float64))
    gradient = u @ torch.diag(torch.arange(1, 61, dtype=torch.float64) ** -2) @ v.T
    shares = []
    for _ in range(50):
        p, _ = torch.linalg.qr(torch.randn(80, 2, generator=g, dtype=torch.float64))
        q, _ = torch.linalg.qr(gradient @ p)
        shares.append([float(x.square().sum() / gradient.square().sum()) for x in (gradient @ p, q.T @ gradient)])
    blind, found = torch.tensor(shares).mean(0)
    assert float(blind) == pytest.approx(2 / 80, rel=0.5)
    assert float(found) > 0.9


def test_bytes_are_one_factor_each_way() -> None:
    w = language(meth=spec(rank=1), turns=4, clients=2, width=64, steps=2, layers=2)
    send, down = w.simulation._send, list[Tree]()
    w.simulation._send = lambda job: (down.append(job.payload), send(job))[1]  # type: ignore[method-assign]
    up: list[tuple[int, Tree]] = []
    accept = w.simulation.server.receive
    w.simulation.server.receive = lambda u: (up.append((u.turn, dict(u.payload))), accept(u))[1]  # type: ignore[method-assign]
    w.run()
    m = sum(len(v) for k, v in w.final.items() if k.endswith(B))
    n = sum(v.shape[1] for k, v in w.final.items() if k.endswith(A))
    for turn, sent in up:
        assert nbytes(sent) == 4 * (n if turn % 2 else m)
    for i, payload in enumerate(down[2:], 2):
        assert nbytes(payload) == 4 * (m if (i // 2) % 2 else n)  # what the turn before has added


@pytest.mark.parametrize(
    "sched",
    ["sync", {"name": "sync", "cohort": 2}, {"name": "fedbuff", "buffer": 1}, {"name": "fedasync"}, "fedfa"],
)
def test_it_learns_and_clients_hold_what_the_server_has(sched: Any) -> None:
    w = language(meth=spec(), sched=sched, turns=12, steps=4, layers=2, width=16)
    rows = collate([t for c in range(3) for t in tokens(c, 3)])
    before = float(w.trainer.loss(w.final, rows))
    server, send = w.simulation.server, w.simulation._send
    start, held = dict(server.state["params"]), dict[int, Tree]()

    def sending(job: Any) -> None:
        held[job.client] = server.method.load(held.get(job.client, start), job.payload)
        for k, x in server.state["params"].items():
            assert torch.equal(held[job.client][k], x), k
        send(job)

    w.simulation._send = sending  # type: ignore[method-assign]
    w.run()
    assert float(w.trainer.loss(w.final, rows)) < before - 0.2


def test_a_late_upload_counts_with_the_factor_of_its_version() -> None:
    w = exact("llama", spec(), 2, lr=0.5)
    server = w.simulation.server
    m: Any = server.method
    then = dict(server.state["params"])
    late = {x + B: torch.ones_like(then[x + B]) for x in modules(then)}
    state = m.step(server.state, [Update(0, 0, 0, 0, m.accept(then, late))], [1.0])
    now = {x + A: torch.ones_like(then[x + A]) for x in modules(then)}
    both = [Update(1, 0, 0, 0, m.accept(then, late)), Update(2, 1, 1, 1, m.accept(state["params"], now))]
    after = m.step(state, both, [1.0, 3.0])
    for x in modules(then):
        p, q = then[x + A], state["params"][x + B]
        want = state["params"][x + BASE] + 0.25 * late[x + B] @ p + 0.75 * q @ now[x + A]
        assert float((after["params"][x + BASE] - want).abs().max()) < 1e-13
    assert {k for k in after["last"] if k.endswith(A)}  # no common factor: both travel


def test_the_factor_that_is_known_is_never_a_clients() -> None:
    """A client that sends it, first of all, adds nothing, and changes nothing for the others."""
    w = exact("llama", spec(), 2, lr=0.5)
    m: Any = w.simulation.server.method
    then = m.step(w.simulation.server.state, [Update(0, 0, 0, 0, m.accept(
        w.simulation.server.state["params"],
        {k: torch.ones_like(x) for k, x in w.simulation.server.state["params"].items() if k.endswith(B)},
    ))], [1.0])  # fmt: skip
    params = then["params"]
    lie = {k: torch.ones_like(x) for k, x in params.items() if k.endswith(B)}
    right = {k: torch.ones_like(x) for k, x in params.items() if k.endswith(A)}
    sent = [Update(i, i, 1, 1, m.accept(params, x)) for i, x in enumerate((lie, right))]
    after = m.step(then, sent, [1.0, 1.0])["params"]
    for x in modules(params):
        want = params[x + BASE] + 0.5 * params[x + B] @ right[x + A]
        assert float((after[x + BASE] - want).abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s, p: s | {k.replace(B, A): p[k.replace(B, A)] for k in s}, "both factors"),
        (lambda s, p: {k: x[:, :1] for k, x in s.items()}, "shape"),
        (lambda s, p: {k: x * float("nan") for k, x in s.items()}, "not finite"),
        (lambda s, p: s | {TURN: p[TURN]}, "not a client's"),
        (lambda s, p: s | {next(k for k in p if k.endswith(BASE)): torch.zeros(1)}, "not a client's"),
        (lambda s, p: {"x" + B: next(iter(s.values()))}, "unknown"),
    ],
)
def test_uploads_that_do_not_fit_are_refused(change: Any, reason: str) -> None:
    w = exact("llama", spec(), 1)
    params = w.simulation.server.state["params"]
    sent = {x + B: torch.ones_like(params[x + B]) for x in modules(params)}
    m, state = w.simulation.server.method, w.simulation.server.state
    assert m.check(state, Update(0, 0, 0, 0, sent)) is None
    assert reason in (m.check(state, Update(0, 0, 0, 0, change(sent, params))) or "")


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(RecipeError, match="dropout: W moves"):
        method.build(spec(dropout=0.1))
    with pytest.raises(RecipeError, match="other directions in every version"):
        exact("llama", spec(), 1, {"name": "overlap"})


@pytest.mark.parametrize("biases", [False, True])
def test_a_run_is_planned_to_the_byte_and_ends_as_a_plain_model(tmp_path: Path, biases: bool) -> None:
    recipe = parse(data(tmp_path, turns=4, method={"name": "fedkrso-feedback", "rank": 1, "biases": biases}))
    planned = plans.clock(recipe)
    run.start(recipe, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out") == "model"
    assert not any("lora" in k for k, _ in load(str(tmp_path / "out")).model.named_parameters())
    lines = [json.loads(x) for x in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    for way in ("down", "up"):
        assert sum(r["bytes"] for r in lines if r["what"] == way) == planned[way] > 0
