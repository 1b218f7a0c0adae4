"""HetLoRA: what weighs an update, the tail and its regularizer, ranks that shrink, padding that stays dead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import collate, language, tokens

from hocket import store
from hocket.methods import Client, Local, Update, method
from hocket.methods.base import State
from hocket.methods.lora import A, B, modules, pair
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, generator, nbytes

Q, V = "layers.0.q", "layers.0.v"
OUT, INNER = 9, 7


def draw(*shape: int, key: Any = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("hetlora", key, *shape))


def build(rank: int = 4, **more: Any) -> Any:
    return method.build({"name": "hetlora", "rank": rank, "alpha": 6.0, **more})


def start(rank: int = 4, names: Sequence[str] = (Q, V)) -> Tree:
    return {m + x: draw(*shape, key=m) for m in names for x, shape in ((A, (rank, INNER)), (B, (OUT, rank)))}


def read(m: Any, state: State, ends: Mapping[int, Tree], rows: Sequence[float]) -> State:
    """The next state when these clients end with these factors."""
    updates = []
    for c, end in ends.items():
        view = m.send(state, Client(c, 1, {"rank": len(next(v for k, v in end.items() if k.endswith(A)))}), 0)
        sent = {k: v - view[k] for k, v in end.items()}
        updates.append(Update(c, c, 0, 0, m.accept(state["params"], sent)))
    after: State = m.step(state, updates, list(rows))
    return after


def pad(x: Tensor, rank: int) -> Tensor:
    """Of A's rows, or of B's columns."""
    out = torch.zeros(rank, INNER) if x.shape[1] == INNER else torch.zeros(OUT, rank)
    out = out.double()
    out[: x.shape[0], : x.shape[1]] = x
    return out


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["model", "matrix"])
def test_factors_are_weighed_by_the_norms_of_products_and_all_else_by_rows(norm: str) -> None:
    m = build(norm=norm, alpha=8.0)
    state = m.init(start() | {"head": draw(3)}, 0)
    ends = {c: {k: v * (1 + c) for k, v in start(r).items()} | {"head": draw(3, key=c)} for c, r in enumerate((4, 2, 1))}
    ends[2] |= {V + B: 0.01 * ends[2][V + B]}  # norms differ from module to module
    after = read(m, state, ends, [5.0, 1.0, 2.0])["params"]
    size = {
        (c, x): float(torch.linalg.matrix_norm(8 / len(end[x + A]) * end[x + B] @ end[x + A])) for c, end in ends.items() for x in (Q, V)
    }
    for x in (Q, V):
        w = [size[c, x] if norm == "matrix" else (size[c, Q] ** 2 + size[c, V] ** 2) ** 0.5 for c in ends]
        for k, unit in ((A, [1, 1, 1]), (B, [8 / 4, 8 / 2, 8 / 1])):
            expected = sum(w[c] / sum(w) * pad(unit[c] * ends[c][x + k], 4) for c in ends)
            assert torch.allclose(after[x + k], expected, atol=1e-12)
    assert torch.allclose(after["head"], (5 * ends[0]["head"] + ends[1]["head"] + 2 * ends[2]["head"]) / 8, atol=1e-12)


def test_equal_ranks_and_equal_norms_are_fedit() -> None:
    m, fedit = build(), method.build({"name": "fedit", "rank": 4, "alpha": 6.0})
    first, turns = start(), {c: (torch.linalg.qr(draw(OUT, OUT, key=c))[0], torch.linalg.qr(draw(INNER, INNER, key=c))[0]) for c in range(3)}
    ends = {c: {k: u @ x if k.endswith(B) else x @ v for k, x in start().items()} for c, (u, v) in turns.items()}
    ours = read(m, m.init(first, 0), ends, [1.0, 7.0, 2.0])  # rows do not count
    theirs = fedit.step(fedit.init(first, 0), [Update(c, c, 0, 0, {k: v - first[k] for k, v in e.items()}) for c, e in ends.items()], [1.0] * 3)
    for x in (Q, V):
        (a, b), (c, d) = pair(ours["params"], x), pair(theirs["params"], x)
        assert torch.allclose(b @ a, 1.5 * d @ c, atol=1e-12)
    assert not torch.allclose(theirs["params"][Q + A], first[Q + A], atol=0.1)


def test_no_norms_leave_the_weights_that_are_given() -> None:
    m = build(norm="none")
    ends = {c: start(r) for c, r in enumerate((4, 2))}
    after = read(m, m.init(start(), 0), ends, [3.0, 1.0])["params"]
    assert torch.allclose(after[Q + A], 0.75 * ends[0][Q + A] + 0.25 * pad(ends[1][Q + A], 4), atol=1e-12)
    assert torch.allclose(after[Q + B], 1.5 * 0.75 * ends[0][Q + B] + 3 * 0.25 * pad(ends[1][Q + B], 4), atol=1e-12)


def test_while_all_products_are_zero_rows_weigh() -> None:
    m = build()
    first = {k: v * 0 if k.endswith(B) else v for k, v in start().items()}
    ends = {c: {k: v + draw(*v.shape, key=c) if k.endswith(A) else v for k, v in first.items()} for c in range(2)}
    after = read(m, m.init(first, 0), ends, [3.0, 1.0])["params"]
    assert torch.allclose(after[Q + A], (3 * ends[0][Q + A] + ends[1][Q + A]) / 4, atol=1e-12)


def test_a_discount_shortens_the_step_whatever_the_norms_are() -> None:
    m = build()
    state = m.init(start(), 0)
    view = m.send(state, Client(0), 0)
    sent = [{k: draw(*v.shape, key=(c, k)) for k, v in view.items()} for c in range(2)]
    updates = [Update(c, c, 0, 0, m.accept(state["params"], s)) for c, s in enumerate(sent)]
    whole = m.step(state, updates, [1.0, 3.0])["params"]
    half = m.step(state, updates, [0.5, 1.5], [1.0, 3.0])["params"]
    for k, v in state["params"].items():
        assert torch.allclose(half[k] - v, (whole[k] - v) / 2, atol=1e-12)


# --- tail and ranks -------------------------------------------------------------------------------------------------


class Scripted:
    """A trainer that ends where it is told to and keeps the penalty that it was given."""

    def __init__(self, end: Tree) -> None:
        self.end, self.penalty = end, None

    def fit(self, local: Local, start: Tree, only: Any, prox: float, penalty: Any = None, masks: Any = None, *_: Any) -> Tree:
        self.penalty = penalty
        return {k: self.end[k] - start[k] for k in start}

    def gradient(self, at: Tree) -> Tree:
        live = {k: v.clone().requires_grad_() for k, v in at.items()}
        assert self.penalty is not None
        self.penalty(live).backward()
        return {k: v.grad for k, v in live.items()}


def train(m: Any, view: Tree, end: Tree) -> tuple[Tree, Scripted]:
    trainer = Scripted(end)
    return m.train(Local(0, view, {}, 0, 1, 0, 0, trainer), view), trainer


def tail(tree: Tree, t: int) -> float:
    return sum(float(tree[m + B][:, t:].norm() * tree[m + A][t:].norm()) for m in modules(tree))


@pytest.mark.parametrize(("gamma", "rank", "t"), [(0.99, 8, 7), (0.5, 8, 4), (0.9, 4, 3), (0.99, 2, 1), (0.1, 4, 1)])
def test_the_regularizer_pulls_at_the_tail_and_at_nothing_else(gamma: float, rank: int, t: int) -> None:
    m = build(rank, gamma=gamma, decay=0.3)
    view = start(rank)
    _, trainer = train(m, view, view)
    assert float(trainer.penalty(view)) == pytest.approx(0.3 * tail(view, t), rel=1e-12)
    for k, g in trainer.gradient(view).items():
        head, rest = (g[:t], g[t:]) if k.endswith(A) else (g[:, :t], g[:, t:])
        assert not head.any()
        assert rest.numel() > 0
        assert bool((rest != 0).all())


def test_one_component_is_no_tail() -> None:
    m = build(1, gamma=0.99, decay=0.3)
    view = start(1)
    sent, trainer = train(m, view, {k: 0.1 * v for k, v in view.items()})
    assert not any(g.any() for g in trainer.gradient(view).values())
    assert len(sent[Q + A]) == 1


@pytest.mark.parametrize("more", [{"gamma": 1.0}, {"decay": 0.0}])
def test_without_a_tail_or_its_weight_the_loss_is_as_it_was(more: Any) -> None:
    view = start()
    assert train(build(**more), view, view)[1].penalty is None


def test_gamma_1_prunes_nothing_and_the_server_keeps_no_ranks() -> None:
    m = build(gamma=1.0)
    state = m.init(start(), 0)
    view = m.send(state, Client(0), 0)
    end = {k: 1e-6 * v for k, v in view.items()}
    sent, _ = train(m, view, end)
    assert all(torch.equal(sent[k], end[k] - view[k]) for k in view)
    after = read(m, state, {0: end}, [1.0])
    assert after["ranks"] == {}
    assert m.increments


@pytest.mark.parametrize("decay", [0.0, 5e-3])
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "constant"])
def test_a_tail_that_lost_weight_is_cut_off_and_what_is_left_is_read_as_it_was_trained(scaling: str, decay: float) -> None:
    m = build(8, gamma=0.7, decay=decay, scaling=scaling, norm="none")
    state = m.init(start(8), 0)
    view = m.send(state, Client(3), 0)
    end = {k: v + 0.3 * draw(*v.shape, key=k) for k, v in view.items()}
    for k in end:
        if k.endswith(A):
            end[k][5:] *= 0.1
    assert tail(end, 5) < tail(view, 5)
    sent, _ = train(m, view, end)
    assert {(len(sent[x + A]), sent[x + B].shape[1]) for x in (Q, V)} == {(5, 5)}
    assert m.check(state, Update(0, 3, 0, 0, sent)) is None
    after = m.step(state, [Update(0, 3, 0, 0, m.accept(state["params"], sent))], [1.0])
    for x in (Q, V):
        a, b = pair(after["params"], x)
        trained = m.scale(x, 8) * end[x + B][:, :5] @ end[x + A][:5]
        assert torch.allclose(b @ a, trained, atol=1e-12)
    assert after["ranks"] == {3: {Q: 5, V: 5}}
    assert [len(m.send(after, Client(c), 1)[Q + A]) for c in (3, 4)] == [5, 8]


def test_each_module_remembers_the_rank_that_it_was_pruned_to() -> None:
    m = build(8, gamma=0.7, rank_pattern={V: 2})
    state = m.init({k: v if k.startswith(Q) else v[:2] if k.endswith(A) else v[:, :2] for k, v in start(8).items()}, 0)
    client = Client(3, 1, {"rank": 6})
    for ranks in ((6, 2), (4, 1), (2, 1)):
        view = m.send(state, client, 0)
        assert (len(view[Q + A]), len(view[V + A])) == ranks
        end = {k: 0.1 * v for k, v in view.items()}
        sent, _ = train(m, view, end)
        state = m.step(state, [Update(0, 3, 0, 0, m.accept(state["params"], sent))], [1.0])
    assert len(m.send(state, Client(4), 0)[Q + A]) == 8


def test_a_tail_that_gained_weight_stays_and_so_does_one_that_was_zero() -> None:
    m = build(8, gamma=0.7)
    view = start(8)
    zero = {k: v * 0 if k.endswith(B) else v for k, v in view.items()}
    for begin, factor in ((view, 1.1), (zero, 0.5)):
        sent, _ = train(m, begin, {k: factor * v for k, v in begin.items()})
        assert len(sent[Q + A]) == sent[Q + B].shape[1] == 8


def test_pruning_makes_both_directions_cheaper_and_outlives_a_checkpoint() -> None:
    w = language(meth={"name": "hetlora", "rank": 8, "gamma": 0.5, "decay": 3.0}, turns=6, layers=2, steps=4)
    server, sim = w.simulation.server, w.simulation
    down, up = {}, {}
    sim.ledger.listener = lambda r: {"down": down, "up": up}.get(r["what"], {}).__setitem__((r.get("client"), r.get("turn")), r.get("bytes"))
    w.run()
    assert all(r < 8 for ranks in server.state["ranks"].values() for r in ranks.values())
    assert set(server.state["ranks"]) == {0, 1, 2}
    for c, ranks in server.state["ranks"].items():
        assert up[c, 5] < up[c, 0] / 1.5
        assert down[c, 5] < down[c, 1] / 1.5
        assert all(len(w.starts[c, 5][m + A]) >= r for m, r in ranks.items())
    tensors, skeleton = store.flatten(sim.state_dict())
    again = store.unflatten(tensors, json.loads(json.dumps(skeleton)))["server"]["state"]
    assert again["ranks"] == server.state["ranks"]
    for c in range(3):
        assert nbytes(server.method.send(again, Client(c), 6)) == nbytes(server.method.send(server.state, Client(c), 6)) < nbytes(w.final)


def test_a_client_without_a_rank_of_its_own_gets_all_that_the_server_has() -> None:
    m = build(4, rank_pattern={"layers.0.v": 6})
    state = m.init(start(4, [Q]) | start(6, [V]), 0)
    view = m.send(state, Client(0), 0)
    assert (len(view[Q + A]), len(view[V + A])) == (4, 6)
    assert [len(m.send(state, Client(0, 1, {"rank": 5}), 0)[x + A]) for x in (Q, V)] == [4, 5]


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_padded_rows_stay_dead_under_adamw(arch: str) -> None:
    """A shell of rank 16 whose other rows are zero trains as adapters of rank 4 do: so the server may pad."""
    m = build(16, scaling="constant")
    model, _ = tiny(arch, vocab=64, layers=2, width=16)
    view = make(model.double(), m, "causal", 0)
    config = Training.model_validate({"lr": 1e-2, "local_steps": 5, "batch_size": 2, "weight_decay": 0.1})
    trainer = TorchTrainer(view, [tokens(0, 6)], collate, config)
    first = {k: v + 0.1 * draw(*v.shape, key=k) for k, v in view.start().items()}
    native = {k: (v[:4] if k.endswith(A) else v[:, :4]).contiguous() for k, v in first.items()}
    shell = {k: v.clone() for k, v in first.items()}
    for k, v in shell.items():
        (v[4:] if k.endswith(A) else v[:, 4:]).zero_()
    small, large = (trainer.fit(Local(0, p, {}, 0, 1, 0, 0, trainer), p, lambda name: True, 0.0) for p in (native, shell))
    for k, v in large.items():
        live, dead = (v[:4], v[4:]) if k.endswith(A) else (v[:, :4], v[:, 4:])
        assert not dead.any()
        assert torch.allclose(live, small[k], atol=1e-12)
        assert small[k].abs().max() > 1e-3
