"""SLoRA: one mask for all, nothing else moves, the switch keeps what rank r can hold, and W_0 comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from worlds import World, assemble, collate, language, tokens

from hocket import run
from hocket.errors import RecipeError
from hocket.evaluate import heldout
from hocket.experiment import Experiment
from hocket.export import export
from hocket.methods import Client, Local, Update, method, slora
from hocket.methods.slora import BASE, ENTRIES, STAGE, A, B, modules
from hocket.models import load
from hocket.models.tiny import tiny
from hocket.models.views import View, make
from hocket.recipe import parse
from hocket.report import read
from hocket.schedules import schedule
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, digest, generator, nbytes

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc", "mlp.c_proj"]}  # most are not square


def spec(arch: str = "llama", **more: Any) -> dict[str, Any]:
    return {"name": "slora", "rank": 2, "alpha": 6.0, "sparse_turns": 5, "targets": TARGETS[arch], **more}


def exact(arch: str, meth: Any, turns: int, clients: int = 3, **training: Any) -> tuple[World, View]:
    """A federation in float64."""
    torch.set_num_threads(1)
    model, _ = tiny(arch, vocab=64, layers=2, width=16)
    m = method.build(meth)
    view = make(model.double(), m, "causal", 7)
    config = Training.model_validate({"lr": 1e-2, "local_steps": 2, "batch_size": 2, **training})
    rows = [3 + i for i in range(clients)]
    trainer = TorchTrainer(view, [tokens(i, n) for i, n in enumerate(rows)], collate, config)
    return assemble(view, trainer, rows, m, "sync", turns, "raw", "raw", weighting="rows"), view


def logits(view: View, params: Tree) -> torch.Tensor:
    view.place(params)
    view.model.eval()
    with torch.no_grad():
        return view.model(input_ids=torch.stack(tokens(9, 4))).logits


def weight_of(m: Any, params: Tree, module: str) -> torch.Tensor:
    """What the module of an exported view computes with."""
    return params[module + BASE] + m.scale(module) * params[module + B] @ params[module + A]


def noting_masks(w: World) -> dict[tuple[int, int], Tree]:
    """The masks of every (client, turn) to come."""
    fit, seen = w.trainer.fit, {}

    def noting(local: Local, start: Tree, only: Any, prox: float, penalty: Any = None, masks: Any = None, *_: Any) -> Tree:
        delta = fit(local, start, only, prox, penalty, masks)
        seen[local.client, local.turn] = {k: (masks[k], delta[k].clone()) for k in masks or {}}
        return delta

    w.trainer.fit = noting
    return seen


def is_masked_averaging(arch: str) -> None:
    """Stage 1 against its definition: W_0 + sum_i p_i (M o V_i) from what clients' own masks were."""
    w, _ = exact(arch, spec(arch), 1, weight_decay=0.4)
    start, seen = dict(w.final), noting_masks(w)
    w.simulation.run()
    for m in modules(start):
        want = start[m + BASE].clone()
        for c in range(3):
            mask, delta = seen[c, 0][m + BASE]
            want.view(-1).index_add_(0, mask, delta * (3 + c) / 12)
        assert torch.allclose(w.final[m + BASE], want, atol=1e-15)
        assert not torch.equal(want, start[m + BASE])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_stage_1_is_averaging_through_one_mask(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_masked_averaging(arch)
    # the check sees what it is for: clients with masks of their own
    own = lambda self, local, start: train(self, local, start | {STAGE: start[STAGE] + torch.tensor([0, local.client])})
    train = slora.SLoRA.train
    monkeypatch.setattr(slora.SLoRA, "train", own)
    with pytest.raises(AssertionError):
        is_masked_averaging(arch)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_unmasked_entries_are_bit_identical_after_stage_1(arch: str, optimizer: str) -> None:
    w = language(arch, turns=3, meth=spec(arch, density=0.1), training={"weight_decay": 0.5, "optimizer": optimizer})
    start, seen = {k: v.clone() for k, v in w.final.items()}, noting_masks(w)
    w.simulation.run()
    assert len(seen) == 9
    for m in modules(start):
        masks = {tuple(s[m + BASE][0].tolist()) for s in seen.values()}
        assert len(masks) == 1  # all clients', in all turns
        (mask,) = masks
        assert len(mask) == round(0.1 * start[m + BASE].numel())
        same = w.final[m + BASE] == start[m + BASE]
        assert same.view(-1)[[i for i in range(same.numel()) if i not in mask]].all()
        assert not same.view(-1)[list(mask)].all()
    assert all(torch.equal(w.final[k], start[k]) for k in start if k.endswith((A, B)))


def before_and_after(arch: str, meth: Any) -> tuple[Any, View, Tree, Tree, Tree]:
    """(method, view, start, the model at the end of stage 1, the same as stage 2 begins)."""
    w, view = exact(arch, meth | {"sparse_turns": 2}, 2)
    start = dict(w.final)
    w.simulation.run()
    undecided, _ = exact(arch, meth | {"sparse_turns": 3}, 2)
    undecided.simulation.run()
    return w.simulation.server.method, view, start, undecided.final, w.final


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_switch_loses_the_spectrum_s_tail_and_gives_w_0_back(arch: str, rank: int) -> None:
    m, _, start, dense, factored = before_and_after(arch, spec(arch, rank=rank, density=0.2))
    for k in modules(start):
        assert torch.equal(factored[k + BASE], start[k + BASE])
        learned = dense[k + BASE] - start[k + BASE]
        s = torch.linalg.svdvals(learned)
        error = weight_of(m, factored, k) - dense[k + BASE]
        assert float(error.square().sum()) == pytest.approx(float(s[rank:].square().sum()), rel=1e-9)
        assert float(learned.norm()) > 1e-3
        a, b = factored[k + A], factored[k + B] * m.scale(k)
        assert torch.allclose(a @ a.T, b.T @ b, atol=1e-12)  # half of the singular values each


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_at_full_rank_the_switch_leaves_every_logit(arch: str) -> None:
    _, view, start, dense, factored = before_and_after(arch, spec(arch, rank=16, density=0.3))
    assert torch.allclose(logits(view, factored), logits(view, dense), atol=1e-10)
    assert not torch.allclose(logits(view, dense), logits(view, start), atol=1e-4)
    twice = factored | {k: dense[k] for k in dense if k.endswith(BASE)}  # W_0 not restored: what was learned counts twice
    assert not torch.allclose(logits(view, twice), logits(view, dense), atol=1e-4)


def test_stage_2_is_fedit_from_there() -> None:
    """The run after the switch, against FedIT's own server and clients on the same start."""
    w, _ = exact("llama", spec(sparse_turns=1, rank=4), 3)
    w.run()
    states = [w.simulation.server.method._view(p) for p in w.iterates]
    fedit, _ = exact("llama", {"name": "fedit", "rank": 4, "alpha": 6.0, "targets": TARGETS["llama"]}, 3)
    server, trainer = fedit.simulation.server, fedit.trainer
    params = {k: v for k, v in states[1].items() if not k.endswith(BASE)}
    for turn in (1, 2):
        updates = [
            Update(c, c, turn, turn, server.method.train(Local(c, params, {}, turn, 3, turn, 7, trainer), params))
            for c in range(3)
        ]
        params = server.method.step({"params": params, "slots": {}}, updates, [3.0, 4.0, 5.0])["params"]
        assert all(torch.allclose(params[k], states[turn + 1][k], atol=1e-12) for k in params)
        assert all(torch.equal(states[turn + 1][k], states[0][k]) for k in states[0] if k.endswith(BASE))


def test_without_stage_1_it_is_fedit_and_not_dead() -> None:
    a = language(meth={"name": "slora", "rank": 2, "sparse_turns": 0}, turns=3)
    b = language(meth={"name": "fedit", "rank": 2}, turns=3)
    assert all(bool(v.any()) for k, v in a.final.items() if k.endswith(A))
    a.simulation.run()
    b.simulation.run()
    assert digest({k: v for k, v in a.final.items() if not k.endswith(BASE)}) == digest(b.final)
    assert a.simulation.ledger.bytes["up"] == b.simulation.ledger.bytes["up"]
    assert all(bool(v.any()) for k, v in a.final.items() if k.endswith(B))


def test_directions_that_were_not_learned_keep_a_random_row() -> None:
    """Three entries give a matrix of rank 3 at most: the other rows of A stay as they were drawn, and can train."""
    w, _ = exact("llama", spec(sparse_turns=1, rank=6, density=1e-9), 1)
    start = dict(w.final)
    w.simulation.run()
    for m in modules(start):
        a, b = w.final[m + A], w.final[m + B]
        assert w.simulation.server.method.count(m, start) == 1
        assert torch.equal(a[1:], start[m + A][1:])
        assert not bool(b[:, 1:].any())
        assert bool(b[:, 0].any())
        assert torch.isfinite(a).all()


def test_values_alone_travel_and_old_ones_do_not() -> None:
    w = language(meth=spec(sparse_turns=2), turns=4)
    up: list[set[str]] = []
    down: list[set[str]] = []
    server, send = w.simulation.server, w.simulation._send
    receive = server.receive
    w.simulation._send = lambda job: (down.append(set(job.payload)), send(job))[1]  # type: ignore[method-assign]
    server.receive = lambda u: (up.append(set(u.payload)), receive(u))[1]  # type: ignore[method-assign]
    assert server.method.beside([*server.state["params"], "classifier.weight"]) == ["classifier.weight"]
    view, sizes = dict(w.final), [nbytes({k: v}) for k, v in server.state["params"].items() if k.endswith(ENTRIES)]
    assert sum(sizes) == nbytes({k: v for k, v in view.items() if k.endswith((A, B))})  # equal cost
    w.simulation.run()
    ends = lambda names: {next(e for e in (ENTRIES, A, B, BASE, STAGE) if k.endswith(e)) for k in names}
    assert [ends(x) for x in up] == [{ENTRIES}] * 6 + [{A, B}] * 6
    assert [ends(x) for x in down[::3]] == [set(), {ENTRIES}, {A, B, STAGE}, {A, B}]
    m, late = server.method, Client(2)
    fresh = m.ship(server.state, late, 4, 0, server.changed)  # somebody who slept through stage 1
    assert ends(fresh) == {A, B, STAGE}
    assert ends(m.ship(server.state, late, 4, -1, server.changed)) == {A, B, STAGE, BASE}  # no weights at all before


def draw(*shape: int, key: Any = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("slora", key, *shape))


def small(**more: Any) -> tuple[Any, Any]:
    """A method and its state at version 0 for one module of 7 x 5."""
    m: Any = method.build({"name": "slora", "rank": 2, "alpha": 6.0, "sparse_turns": 1, **more})
    params = {"q" + A: draw(2, 5), "q" + B: torch.zeros(7, 2).double(), "q" + BASE: draw(7, 5), "head": draw(3)}
    return m, m.init(params, 11)


def update(payload: Tree, job: int = 0, version: int = 0) -> Update:
    return Update(job, job, version, version, payload)


def test_a_straggler_s_values_become_the_nearest_change_of_b() -> None:
    m, state = small(density=0.5)
    n = len(state["params"]["q" + ENTRIES])
    first = m.step(state, [update({"q" + ENTRIES: draw(n), "head": draw(3)})], [1.0])
    params = first["params"]
    late = {"q" + ENTRIES: draw(n, key="late"), "head": draw(3, key="late")}
    assert m.check(first, update(late)) is None
    after = m.step(first, [update(late, 1), update({"q" + B: torch.zeros(7, 2).double()}, 2, 1)], [1.0, 3.0])["params"]
    dense = torch.zeros(35).double()
    dense[m.mask("q", params)] = late["q" + ENTRIES]
    dense = dense.view(7, 5)
    a = params["q" + A]
    want = torch.linalg.lstsq(3.0 * a.T, dense.T).solution.T  # min |D - s X A|, s = 6 / 2
    assert torch.allclose(after["q" + B] - params["q" + B], want / 4, atol=1e-12)
    assert torch.allclose(after["head"] - params["head"], late["head"], atol=1e-15)
    assert torch.equal(after["q" + A], params["q" + A])
    assert torch.equal(after["q" + ENTRIES], params["q" + ENTRIES])
    world = m.own(params, {"q" + ENTRIES: late["q" + ENTRIES] / 4})  # what its client starts from meanwhile
    assert torch.allclose(world["q" + B], after["q" + B], atol=1e-12)


def test_uploads_of_another_kind_are_refused() -> None:
    m, state = small()
    n = len(state["params"]["q" + ENTRIES])
    assert n == 2 * (7 + 5)
    assert "not a client's" in m.check(state, update({"q" + BASE: draw(7, 5)}))
    assert "not a client's" in m.check(state, update({STAGE: torch.tensor([2, 0])}))
    assert "not a client's" in m.check(state, update({"q" + A: draw(2, 5)}))  # stage 2 has not begun
    assert "shape" in m.check(state, update({"q" + ENTRIES: draw(n + 1)}))
    assert "finite" in m.check(state, update({"q" + ENTRIES: draw(n) / 0}))
    after = m.step(state, [update({"q" + ENTRIES: draw(n)})], [1.0])
    assert m.check(after, update({"q" + A: draw(2, 5), "q" + B: draw(7, 2)})) is None


def test_a_start_adapter_is_part_of_what_is_decomposed() -> None:
    m, state = small(rank=2)
    b = draw(7, 2, key="adapter")
    state["params"]["q" + B] = b
    n = len(state["params"]["q" + ENTRIES])
    after = m.step(state, [update({"q" + ENTRIES: torch.zeros(n).double()})], [1.0])["params"]
    assert torch.allclose(after["q" + B] @ after["q" + A], b @ state["params"]["q" + A], atol=1e-12)


@pytest.mark.parametrize("sched", ["safa", {"name": "fedfa", "form": "model"}], ids=str)
def test_schedules_that_mix_in_the_start_model_are_refused(sched: Any) -> None:
    with pytest.raises(RecipeError, match="mixes in the start model"):
        language(meth=spec(), sched=sched)
    assert schedule.build(sched).refuses(method.build(spec(sparse_turns=0))) is None


@pytest.mark.parametrize("sched", ["sync", "overlap", "fedbuff", "fedasync", "port", "ca2fl"])
def test_it_learns_in_both_stages_under_any_clock(sched: str) -> None:
    w = language(meth=spec(rank=4, sparse_turns=6), sched=sched, turns=30, layers=2, width=16, training={"lr": 2e-2})
    batch = collate([t for c in range(3) for t in tokens(c, 3)])
    losses = []

    def measure(params: Tree) -> dict[str, Any]:
        losses.append(float(w.trainer.loss(params, batch)))
        return {}

    w.simulation.evaluations.measure = measure
    measure(w.final)
    w.simulation.run()
    assert losses[6] < losses[0] - 0.1  # 4.2, about 3.8 (FedAsync, with a version an arrival, 4.04) and 3.2 (3.6)
    assert losses[-1] < losses[6] - 0.3


@pytest.mark.parametrize(("sparse", "kind"), [(1, "adapter"), (9, "model")])
def test_stage_2_is_exported_as_an_adapter_and_stage_1_whole(tmp_path: Path, sparse: int, kind: str) -> None:
    """W_0 is in every copy of the start model: only what was written into it has to be told."""
    (tmp_path / "a.txt").write_text("\n".join(f"client text number {i} of sixty" for i in range(60)))
    recipe = parse({
        "turns": 2, "model": {"source": "tiny:gpt2"}, "method": {"name": "slora", "rank": 2, "sparse_turns": sparse},
        "data": {"source": str(tmp_path / "a.txt"), "max_length": 64}, "clients": {"count": 2}, "training": {"lr": 1e-2},
    })  # fmt: skip
    run.start(recipe, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out") == kind
    if kind == "adapter":
        opened = PeftModel.from_pretrained(load("tiny:gpt2", seed=recipe.seed).model, tmp_path / "out")
    else:
        opened = load(str(tmp_path / "out")).model
    e, last = Experiment(recipe), read(tmp_path / "run").evals[-1]
    assert heldout(opened, e.data.heldout, e.collate)["loss"] == pytest.approx(last["loss"], rel=1e-5)
