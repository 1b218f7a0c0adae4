"""Memory of a client: what is planned from shapes against what a real step holds, for every method."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import collate, tokens

from hocket import recipe, report, run
from hocket.methods import Client, Local, method
from hocket.models import memory
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.needs import shortage
from hocket.plan import plan
from hocket.sections import Training
from hocket.training import TorchTrainer

ROWS, LENGTH = 2, 24
# beside every registered method as it is: the kinds of blocks
CASES = [
    *method.names(), {"name": "fedbcd", "partial": True}, {"name": "fedbcd", "order": "gradient"},
    {"name": "fedbcd", "extras": True, "layers_per_block": 4, "order": "sequential"},
]  # fmt: skip


def both(
    meth: Any, arch: str = "llama", dtype: torch.dtype = torch.float32, turns: int = 1, rank: int | None = None,
    **training: Any,
) -> tuple[memory.Memory, dict[str, float]]:  # fmt: skip
    """Planned, and measured, of the job of the last of `turns` of a client, with a rank of its own or none."""
    arch = "gpt2" if meth == "fedpeft-bias" else arch  # llama has no biases
    model, _ = tiny(arch, vocab=64, layers=4, width=64)
    m = method.build(meth)
    view = make(model.to(dtype), m, "causal", 3)
    config = Training.model_validate({"batch_size": ROWS, "local_steps": 2, "measure_memory": True, **training})
    trainer = TorchTrainer(view, [tokens(0, 6, length=LENGTH)], collate, config)
    state = m.init(trainer.start(), 1)
    client = Client(0, 1, {"rank": rank} if rank else {})
    start = m.send(state, client, 0) if rank else state["params"]
    noted = memory.Noted(trainer)
    private: dict[str, torch.Tensor] = {}
    for turn in range(turns):
        local = Local(0, start, private, turn, turns, turn, 1, noted, client.traits)
        m.train(local, start)
    step = memory.Step(ROWS, LENGTH, config.slots, config.precision)
    jobs = {0: noted.jobs[0][-1:]}
    found = {k.removeprefix("memory_"): v for k, v in local.metrics.items() if k.startswith("memory_")}
    return memory.needs(view, jobs, step, keep=config.optimizer_state == "keep")[0], found


@pytest.mark.parametrize("meth", CASES, ids=str)
def test_planned_is_measured_for_every_method(meth: Any) -> None:
    """Parameters, gradients and optimizer within 10 % (in truth within 1 %); so is what is alive between the phases."""
    planned, measured = both(meth)
    for part in ("parameters", "gradients", "optimizer", "after_start", "after_backward", "after_step"):
        assert planned.table[part] == pytest.approx(measured[part], rel=0.01), part
    assert planned.activations == pytest.approx(measured["activations"], rel=0.15)
    assert planned.table["after_forward"] == pytest.approx(measured["after_forward"], rel=0.1)
    slack = 1.05 if meth == "fedpeft-bias" else 1.0  # on gpt2, whose activation function has passing tensors of its own
    assert measured["peak"] < slack * planned.total < 1.35 * measured["peak"]


@pytest.mark.parametrize("meth", ["hlora", "hetlora", "fedsvd", "flora"])
def test_planned_is_measured_for_clients_of_their_own_ranks(meth: str) -> None:
    spec = {"name": meth, "rank": 32}
    planned, measured = both(spec, rank=2)
    for part in ("parameters", "gradients", "optimizer", "after_start", "after_backward", "after_step"):
        assert planned.table[part] == pytest.approx(measured[part], rel=0.01), part
    assert planned.activations == pytest.approx(measured["activations"], rel=0.15)
    assert measured["peak"] < planned.total < 1.35 * measured["peak"]
    full, _ = both(spec)
    assert planned.gradients < full.gradients / 8
    assert planned.weights < full.weights
    assert planned.activations < full.activations


def test_a_plan_tells_clients_of_small_ranks_from_those_of_large_ones(small: dict[str, Any]) -> None:
    clients = {"count": 3, "ranks": [2, 4, 64]}
    more = {"method": {"name": "hlora", "rank": 64}, "schedule": "sync", "clients": clients}
    totals = sorted(c["memory"].total for c in plan(recipe.parse(small | more))["clients"])
    assert totals[0] < totals[1] < totals[2]


@pytest.mark.parametrize(
    ("arch", "training"),
    [
        ("gpt2", {}),
        ("llama", {"optimizer": "sgd"}),
        ("llama", {"optimizer": "sgd", "momentum": 0.9}),
        ("llama", {"accumulation": 2}),
        ("llama", {"precision": "bf16"}),
        ("llama", {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_planned_is_measured_with_other_optimizers_and_precisions(arch: str, training: dict[str, Any]) -> None:
    for meth in ("fedavg", "fedbcd", "fedit"):
        planned, measured = both(meth, arch, **training)
        for part in ("parameters", "gradients", "optimizer"):
            assert planned.table[part] == pytest.approx(measured[part], rel=0.01), (meth, part)
        assert planned.activations == pytest.approx(measured["activations"], rel=0.15)


def test_a_step_not_measured_reports_nothing_and_a_measured_one_trains_alike() -> None:
    deltas = []
    for measure in (False, True):
        model, _ = tiny("llama", vocab=64, layers=2, width=16)
        view = make(model, method.build("fedavg"), "causal", 3)
        config = Training.model_validate({"batch_size": 2, "local_steps": 2, "measure_memory": measure})
        local = Local(0, {}, {}, 0, 1, 0, 1, TorchTrainer(view, [tokens(0, 6)], collate, config))
        deltas.append(local.fit(view.start()))
        assert any(k.startswith("memory_") for k in local.metrics) == measure
    assert all(torch.equal(deltas[0][k], deltas[1][k]) for k in deltas[0])


def test_own_updates_error_feedback_and_kept_state_are_counted() -> None:
    model, _ = tiny("llama", vocab=64, layers=4, width=16)
    view = make(model, method.build("fedbcd"), "causal", 3)
    blocks = method.build("fedbcd").cut(view.params)  # type: ignore[attr-defined]
    size = [4 * sum(view.params[k].numel() for k in b) for b in blocks]
    jobs = {0: [memory.Fitted(blocks[i]) for i in (0, 1, 0)], 1: []}
    one = memory.needs(view, jobs, memory.Step(2, 24))
    assert one[0].in_flight == one[0].kept == 0
    assert one[1].total == one[1].weights == 4 * view.total
    assert memory.needs(view, jobs, memory.Step(2, 24), ahead=1)[0].in_flight == size[0]
    assert memory.needs(view, jobs, memory.Step(2, 24), ahead=2)[0].in_flight == sum(size)
    assert memory.needs(view, jobs, memory.Step(2, 24), feedback=True)[0].kept == sum(size)
    assert memory.needs(view, jobs, memory.Step(2, 24), keep=True)[0].kept == 2 * sum(size)
    gpu = memory.needs(view, jobs, memory.Step(2, 24, gpu=True), ahead=2, feedback=True)[0]
    assert gpu.trained == gpu.in_flight == gpu.kept == 0
    _, measured = both("fedbcd", turns=3, optimizer_state="keep")
    assert measured["private"] > 0


def test_checkpointing_lowers_the_plan_and_values_that_are_looked_at_do_not_stop_it() -> None:
    model, _ = tiny("llama", vocab=64, layers=8, width=64)
    view = make(model, method.build("fedavg"), "causal", 3)
    plain, _ = memory.activations(view, view.params, memory.Step(2, 24))
    less, _ = memory.activations(view, view.params, memory.Step(2, 24, checkpointing=True))
    assert less < 0.5 * plain
    model, _ = tiny("llama", vocab=64, layers=8, width=64)
    view = make(model, method.build("fedavg"), "causal", 3)
    model.model.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("data dependent")))
    rough, _ = memory.activations(view, view.params, memory.Step(2, 24))
    assert 0.5 * plain < rough < 2 * plain


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    rows = [{"instruction": f"add {a} and {b}", "output": f"{a + b} is the sum"} for a in range(6) for b in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "turns": 3,
        "model": {"source": "tiny:llama", "device": "cpu"},
        "data": {"source": str(tmp_path / "rows.jsonl"), "template": "plain", "max_length": 64},
        "method": {"name": "fedbcd"},
        "schedule": {"name": "overlap", "staleness": 1},
        "clients": {"count": 3, "each": [{"memory_gb": 1e-4}, {"memory_gb": 2.0}]},
        "training": {"measure_memory": True, "local_steps": 2, "batch_size": 2},
    }


def test_a_client_with_too_little_memory_is_named_with_the_bytes(small: dict[str, Any]) -> None:
    found = plan(recipe.parse(small))
    assert [c["fits"] for c in found["clients"]] == [False, True, None]
    (line,) = shortage(found["clients"])
    need = found["clients"][0]["memory"].total
    assert "client 0:" in line
    assert f"{need:,} bytes" in line
    assert "100,000 bytes" in line
    many = [{"client": i, "fits": False, "memory_gb": 1.0, "memory": memory.Memory(2 * 10**9)} for i in range(30)]
    assert "and 20 more" in shortage(many)[0]


def test_a_run_warns_measures_and_reports(small: dict[str, Any], tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    path = run.start(recipe.parse(small), tmp_path / "run", said.append)
    assert any(row["what"] == "warning" and "memory of client 0" in row["text"] for row in said)
    first = next(i for i, row in enumerate(said) if row["what"] == "compute")
    assert any(row["what"] == "warning" for row in said[:first])
    found = report.read(path)
    assert found.planned.keys() == found.measured.keys() == {0, 1, 2}
    for client in found.planned:
        for part in ("parameters", "private", "gradients", "optimizer", "after_backward", "after_upload"):
            assert found.planned[client][part] == pytest.approx(found.measured[client][part], rel=0.02), part
    text = report.build([path], tmp_path / "x.html").read_text()
    table = re.search(r"<table class='memory'>.*?</table>", text, re.S)
    assert table
    assert table[0].count("<tr>") == 4
    assert table[0].count(" / ") > 30
