"""Clients of unequal ranks: what an aggregation makes of their products, what a cut loses, which components fade."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import language

from hocket import products
from hocket.methods import Client, Update, method
from hocket.methods.base import State
from hocket.methods.lora import BASE, A, B, modules, pair
from hocket.schedules import schedule
from hocket.server import Server
from hocket.tree import Tree, generator

M = "layers.0.q"
OUT, INNER = 20, 18
EFFECTIVE = ["hlora", "hlora-delta", "flexlora", "raflora"]
PLAIN = {"name": "hetlora", "gamma": 1, "decay": 0, "norm": "none"}  # HetLoRA without what it adds to zero-padding
Change = Callable[[int, Tree], Tree]


def draw(*shape: int, key: Any = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("unequal", key, *shape))


def build(spec: Any, rank: int = 16, **more: Any) -> Any:
    return method.build({**({"name": spec} if isinstance(spec, str) else spec), "rank": rank, "alpha": 6.0, **more})


def diagonal(out: int = OUT, inner: int = INNER, rank: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values and V^T of a matrix of that rank."""
    u, v = (torch.linalg.qr(draw(n, rank, key=n))[0] for n in (out, inner))
    return u, torch.linspace(3, 1, rank).double(), v.mT


def begin(m: Any, b: Tensor, a: Tensor) -> State:
    """The server's state when the adapters' product is B A."""
    state: State = m.init({M + A: a, M + B: b / m.scale(M)}, 5)
    return state


def spread(m: Any) -> State:
    """A state with components in order, half of each singular value on either factor."""
    u, s, vt = diagonal(rank=m.rank)
    return begin(m, u * s.sqrt(), s.sqrt().unsqueeze(1) * vt)


def moves(client: int, start: Tree) -> Tree:
    """Some training: differences that are the client's own."""
    return {k: 0.3 * draw(*v.shape, key=(client, k)) for k, v in start.items()}


def rests(client: int, start: Tree) -> Tree:
    return {k: torch.zeros_like(v) for k, v in start.items()}


def trained(m: Any, client: int, view: Tree, change: Change) -> Tree:
    """What a client of this method uploads."""
    frozen = (BASE, A) if m.name in ("fedsvd", "ffa-lora", "rolora") else BASE
    return {k: v for k, v in change(client, view).items() if not k.endswith(frozen)}


def uploads(m: Any, state: State, ranks: Sequence[int], change: Change = moves, clients: Sequence[int] = ()) -> list[Update]:
    """What the server reads when clients of these ranks have trained on what it sends them."""
    updates = []
    for c, r in zip(clients or range(len(ranks)), ranks, strict=True):
        sent = trained(m, c, m.send(state, Client(c, 1, {"rank": r}), 0), change)
        assert m.check(state, Update(c, c, 0, 0, sent)) is None
        updates.append(Update(c, c, 0, 0, m.accept(state["params"], sent) if m.anchored else sent))
    return updates


def product(m: Any, state: State) -> Tensor:
    """s B A at the server."""
    a, b = pair(state["params"], M)
    return m.stored(M) * b @ a


def held(m: Any, view: Tree) -> Tensor:
    """s B A of a client's view, as its own model has it."""
    a, b = pair(view, M)
    return m.scale(M, len(a)) * b @ a


def ends(m: Any, state: State, ranks: Sequence[int], change: Change = moves) -> tuple[list[Tensor], list[Tensor]]:
    """The clients' products before and after training, from their views alone."""
    views = [m.send(state, Client(c, 1, {"rank": r}), 0) for c, r in enumerate(ranks)]
    sent = [trained(m, c, view, change) for c, view in enumerate(views)]
    after = [{k: v + moved.get(k, 0) for k, v in view.items()} for view, moved in zip(views, sent, strict=True)]
    return [held(m, v) for v in views], [held(m, v) for v in after]


def cut(x: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    u, s, vt = torch.linalg.svd(x)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def close(x: Tensor, y: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((x - y).abs().max() <= tolerance)


# --- which components fade ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "power"), [("hlora", 1), ("flexlora", 1), (PLAIN, 2)])
def test_without_training_a_component_fades_with_those_who_lack_it(spec: Any, power: int) -> None:
    """Of a zero-padded average both factors fade, so their product does twice as fast."""
    m = build(spec)
    state, (u, s, vt) = spread(m), diagonal()
    q = torch.tensor([1.0] * 4 + [0.5] * 4 + [0.25] * 8).double()
    for t in range(1, 5):
        state = m.step(state, uploads(m, state, [4, 4, 8, 16], rests), [1.0] * 4)
        assert close(product(m, state), u * (s * q ** (power * t)) @ vt)


@pytest.mark.parametrize("who", [[0, 1, 2, 3], [0], [0, 2], [3]])
@pytest.mark.parametrize("spec", ["hlora-delta", "raflora", "fedsvd"])
def test_differences_to_what_was_sent_leave_the_model_without_training(spec: str, who: list[int]) -> None:
    m = build(spec)
    state, (u, s, vt) = spread(m), diagonal()
    for _ in range(10):
        ranks = [[4, 4, 8, 16][c] for c in who]
        state = m.step(state, uploads(m, state, ranks, rests, who), [1.0 + c for c in who])
        assert close(product(m, state), u * s @ vt)


@pytest.mark.parametrize("spec", EFFECTIVE)
def test_what_a_client_of_small_rank_brings_can_be_trained_on_at_full_rank(spec: str) -> None:
    """From the start, B = 0: after a round of a client of rank 2 alone, the other components are zero but not dead."""
    m = build(spec, rank=8)
    state = begin(m, torch.zeros(OUT, 8).double(), draw(8, INNER))
    _, (end,) = ends(m, state, [2])
    state = m.step(state, uploads(m, state, [2]), [1.0])
    view = m.send(state, Client(1, 1, {"rank": 8}), 1)
    assert close(held(m, view), end)
    assert torch.linalg.matrix_rank(end) == 2
    a, b = pair(view, M)
    assert a.shape == (8, INNER)
    assert bool((a[2:].norm(dim=1) > 0.1).all())  # B's gradient is not zero
    assert not b[:, 2:].any()
    assert torch.linalg.matrix_rank(a) == 8
    again = m.step(state, uploads(m, state, [8]), [1.0])
    assert torch.linalg.matrix_rank(product(m, again)) == 8


@pytest.mark.parametrize("spec", EFFECTIVE)
def test_fresh_rows_are_drawn_anew_in_each_version_and_alike_in_each_run(spec: str) -> None:
    m = build(spec, rank=8)
    start = begin(m, torch.zeros(OUT, 8).double(), draw(8, INNER))
    first = m.step(start, uploads(m, start, [2]), [1.0])
    same = m.step(start, uploads(m, start, [2]), [1.0])
    second = m.step(first, uploads(m, first, [2], rests), [1.0])
    assert torch.equal(first["params"][M + A], same["params"][M + A])
    assert not close(first["params"][M + A][2:], second["params"][M + A][2:], 1e-3)
    assert close(product(m, first), product(m, second))


# --- the sum --------------------------------------------------------------------------------------------------------

SPECS: list[Any] = [*EFFECTIVE, "fedsvd", PLAIN, "fedex-lora", "fedit", "ffa-lora", "rolora"]


def model(m: Any, state: State) -> Tensor:
    """What the server's model adds to the weight it began with."""
    base = state["params"].get(M + BASE)
    return product(m, state) + (0 if base is None else base)


def small(m: Any) -> State:
    """Every rank is possible: 7 x 6."""
    tree = {M + A: draw(m.rank, 6), M + B: 0.5 * draw(7, m.rank)}
    state: State = m.init(tree | ({M + BASE: torch.zeros(7, 6).double()} if m.merges else {}), 5)
    return state


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_order_of_clients_does_not_matter(spec: Any) -> None:
    m = build(spec, rank=6)
    state = small(m)
    sent = uploads(m, state, [1, 6, 3] if m.unequal else [6, 6, 6])
    one = m.step(state, sent, [1.0, 2.0, 4.0])
    other = m.step(state, sent[::-1], [4.0, 2.0, 1.0])
    assert close(model(m, one), model(m, other))
    assert not close(model(m, one), model(m, m.step(state, sent[::-1], [1.0, 2.0, 4.0])), 1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_client_twice_is_a_client_of_twice_the_weight(spec: Any) -> None:
    m = build(spec, rank=6)
    state = small(m)
    sent = uploads(m, state, [1, 6, 3] if m.unequal else [6, 6, 6])
    twice = m.step(state, [sent[0], sent[1], sent[1], sent[2]], [1.0] * 4)
    assert close(model(m, twice), model(m, m.step(state, sent, [1.0, 2.0, 1.0])))
    assert not close(model(m, twice), model(m, m.step(state, sent, [1.0] * 3)), 1e-3)


@pytest.mark.parametrize("spec", [*SPECS, "hetlora"], ids=str)
def test_a_client_alone_of_full_rank_is_the_next_model(spec: Any) -> None:
    m = build(spec, rank=6)
    state = small(m)
    (before,), (end,) = ends(m, state, [6])
    assert close(before, model(m, state))
    assert close(model(m, m.step(state, uploads(m, state, [6]), [3.0])), end)
    assert not close(before, end, 0.1)


SCALES = {
    "alpha/r": [6 / 1, 6 / 2, 6 / 3],
    "alpha/sqrt(r)": [6.0, 6 / 2**0.5, 6 / 3**0.5],
    "constant": [6 / 6] * 3,
}


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("spec", EFFECTIVE)
def test_products_are_added_with_the_scale_of_each_client(spec: str, scaling: str) -> None:
    """From B = 0, at full rank: D = sum_i p_i s_i B_i A_i (raFLoRA: blocks over those who have them)."""
    m = build(spec, rank=6, scaling=scaling)
    state = m.init({M + A: draw(6, 6), M + B: torch.zeros(7, 6).double()}, 5)
    ranks, weights, p = [1, 2, 3], [1.0, 5.0, 2.0], [1 / 8, 5 / 8, 2 / 8]
    views = [{k: v + moves(c, {k: v})[k] for k, v in m.send(state, Client(c, 1, {"rank": r}), 0).items()} for c, r in enumerate(ranks)]
    assert [m.scale(M, r) for r in ranks] == SCALES[scaling]
    having = [[1.0, 7 / 8, 2 / 8][: len(v[M + A])] if spec == "raflora" else [1.0] * 3 for v in views]

    def ideal(scales: Sequence[float]) -> Tensor:
        terms = zip(p, scales, views, having, strict=True)
        return sum((p * s * v[M + B] / torch.tensor(q).double()[: len(v[M + A])] @ v[M + A] for p, s, v, q in terms), torch.zeros(7, 6))

    after = product(m, m.step(state, uploads(m, state, ranks), weights))
    assert close(after, ideal(SCALES[scaling]), 1e-12)
    if scaling != "constant":
        assert not close(after, ideal([1.0] * 3), 0.1)
        assert not close(after, ideal([1.0, 1.0, 1.0]) * SCALES[scaling][1], 0.1)


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("spec", ["hlora", PLAIN], ids=str)
def test_every_client_gets_the_cut_of_the_model_whatever_its_scale(spec: Any, scaling: str) -> None:
    m = build(spec, rank=6, scaling=scaling)
    state, (u, s, vt) = spread(m), diagonal(rank=6)
    for r in (1, 2, 5, 6, 9):
        view = m.send(state, Client(0, 1, {"rank": r}), 0)
        assert view[M + A].shape == (min(r, 6), INNER)
        assert close(held(m, view), (u * s)[:, :r] @ vt[:r], 1e-12)
    assert close(held(m, m.send(state, Client(0), 0)), u * s @ vt, 1e-12)
    assert close(held(m, m.export(state)), u * s @ vt, 1e-12)


# --- the cut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["even", "A", "B"])
@pytest.mark.parametrize("spec", EFFECTIVE)
def test_a_step_loses_the_tail_and_a_client_gets_the_best_of_its_rank(spec: str, split: str) -> None:
    m = build(spec, rank=5, split=split)
    state, ranks = spread(m), [1, 3, 4, 5]
    before, after = ends(m, state, ranks)
    if spec in ("hlora", "flexlora"):
        ideal = sum(after) / 4
    elif spec == "hlora-delta":
        ideal = product(m, state) + sum(y - x for x, y in zip(before, after, strict=True)) / 4
    else:
        ideal = blocks(m, state, ranks, [0.25] * 4)
    step = m.step(state, uploads(m, state, ranks), [1.0] * 4)
    tail = torch.linalg.svdvals(ideal)
    kept = OUT if spec == "flexlora" else 5  # FlexLoRA's server cuts for clients only
    lost = float((product(m, step) - ideal).norm())
    assert abs(lost - float(tail[kept:].norm())) < 1e-10
    assert float(tail[5:].norm()) > 0.1
    for r in (1, 3, 5):
        view = m.send(step, Client(0, 1, {"rank": r}), 1)
        assert close(held(m, view), cut(ideal, r))
    a, b = pair(step["params"], M)
    s = torch.linalg.svdvals(product(m, step))[: len(a)]
    power = {"even": 0.5, "A": 0.0, "B": 1.0}[split]
    assert close(b.mT @ b, torch.diag(s ** (2 * power)), 1e-9)
    assert close(a @ a.mT, torch.diag(s ** (2 - 2 * power)), 1e-9)


def blocks(m: Any, state: State, ranks: Sequence[int], share: Sequence[float]) -> Tensor:
    """raFLoRA's rule, component by component; what nobody has stays as it is."""
    a, b = pair(state["params"], M)
    views = [m.send(state, Client(c, 1, {"rank": r}), 0) for c, r in enumerate(ranks)]
    total = torch.zeros(len(b), a.shape[1]).double()
    for h in range(len(a)):
        having = [c for c, r in enumerate(ranks) if r > h]
        if not having:
            total += torch.outer(b[:, h], a[h])
        for c in having:
            x = {k: v + moves(c, views[c])[k] for k, v in views[c].items()}
            p = share[c] / sum(share[i] for i in having)
            total += p * m.scale(M, ranks[c]) * torch.outer(x[M + B][:, h], x[M + A][h])
    return total


def test_raflora_averages_each_block_over_those_who_have_it() -> None:
    m = build("raflora", rank=18)
    u, s, vt = diagonal(rank=18)
    state = begin(m, u * s.sqrt(), s.sqrt().unsqueeze(1) * vt)
    ranks, weights = [2, 4, 10], [3.0, 1.0, 4.0]
    after = product(m, m.step(state, uploads(m, state, ranks), weights))
    assert close(after, blocks(m, state, ranks, weights))
    hlora = build("hlora", rank=18)
    same = begin(hlora, u * s.sqrt(), s.sqrt().unsqueeze(1) * vt)
    assert not close(after, product(hlora, hlora.step(same, uploads(hlora, same, ranks), weights)), 0.1)
    # components 11 to 18: nobody has them
    alone = uploads(m, state, ranks, lambda c, v: rests(c, v) | {M + B: moves(c, v)[M + B]})
    left = product(m, m.step(state, alone, weights)) @ vt[10:].mT
    assert close(left, (u * s)[:, 10:])


def test_at_equal_ranks_hlora_hlora_delta_and_flexlora_send_the_same() -> None:
    ms = [build(n, rank=4, split="even") for n in ("hlora", "hlora-delta", "flexlora")]
    states = [begin(m, torch.zeros(OUT, 4).double(), draw(4, INNER)) for m in ms]
    for t in range(4):
        change = lambda c, v, t=t: {k: 0.3 * draw(*x.shape, key=(c, t, k)) for k, x in v.items()}
        states = [m.step(s, uploads(m, s, [4, 4, 4], change), [1.0, 2.0, 1.0]) for m, s in zip(ms, states, strict=True)]
        views = [m.send(s, Client(0, 1, {"rank": 4}), t + 1) for m, s in zip(ms, states, strict=True)]
        for view in views[1:]:
            assert all(close(view[k], views[0][k], 1e-8) for k in view)
    assert len(states[2]["params"][M + A]) > len(states[0]["params"][M + A]) == 4


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("spec", [*EFFECTIVE, "fedsvd"])
def test_a_discount_shortens_the_step_and_the_rate_multiplies_it(spec: str, rate: float) -> None:
    m = build(spec, rank=6, server_lr=rate)
    plain = build(spec, rank=6)
    state = small(m)
    sent = uploads(m, state, [2, 6, 3])
    weights, shares = [0.5, 0.25, 1.0], [1.0, 1.0, 2.0]
    after = product(m, m.step(state, sent, weights, shares))
    whole = product(plain, plain.step(state, sent, weights, weights))
    before = product(m, state)
    expected = rate * (1.75 / 4) * (whole - before)
    if spec == "raflora":  # by component: w_i over the shares of those who have it
        views = [m.send(state, Client(c, 1, {"rank": r}), 0) for c, r in enumerate([2, 6, 3])]
        a, b = pair(state["params"], M)
        having = torch.tensor([4.0, 4, 3, 1, 1, 1]).double()
        expected = torch.zeros_like(before)
        for c, (view, w) in enumerate(zip(views, weights, strict=True)):
            r = len(view[M + A])
            end = {k: v + moves(c, view)[k] for k, v in view.items()}
            count = rate * w / having[:r]
            expected += m.scale(M, r) * (end[M + B] * count) @ end[M + A] - (b[:, :r] * count) @ a[:r]
    assert close(after - before, expected)
    assert not close(after, before, 0.01)


def test_raflora_leaves_what_only_clients_of_no_weight_have() -> None:
    m = build("raflora", rank=6)
    state = small(m)
    sent = uploads(m, state, [2, 6])
    alone = product(m, m.step(state, sent[:1], [1.0]))
    assert close(product(m, m.step(state, sent, [1.0, 0.0])), alone)
    assert close(product(m, m.step(state, sent, [1.0, 0.0], [1.0, 0.0])), alone)


@pytest.mark.parametrize("spec", [*EFFECTIVE, "fedsvd"])
def test_an_update_of_an_older_version_is_a_difference_to_that_version(spec: str) -> None:
    m = build(spec, rank=6)
    first = small(m)
    late = uploads(m, first, [6], clients=[9])
    second = m.step(first, uploads(m, first, [6, 6]), [1.0, 1.0])
    after = m.step(second, [*late, *uploads(m, second, [6], rests)], [1.0, 1.0])
    (_,), (end,) = ends(m, first, [6], lambda c, v: moves(9, v))
    assert close(product(m, after), product(m, second) + (end - product(m, first)) / 2)


@pytest.mark.parametrize("spec", [*EFFECTIVE, "fedsvd"])
def test_a_stale_model_is_mixed_in_as_it_was_trained(spec: str) -> None:
    """FedAsync: D <- (1 - alpha) D + alpha (D_then + what the client adds to it)."""
    m = build(spec, rank=6)
    start = {M + A: draw(6, INNER), M + B: draw(OUT, 6)}
    sched = schedule.build({"name": "fedasync", "alpha": 0.25, "fading": "constant"})
    server = Server(m, sched, start, [Client(c, 1, {"rank": r}) for c, r in enumerate((3, 6))], 3, 0)
    jobs = {j.client: j for j in server.poll()}
    first = product(m, server.state)
    views = [m.send(server.state, server.clients[c], 0) for c in (0, 1)]
    for c in (0, 1):
        view = {k: views[c][k] for k in start}
        sent = trained(m, c, view, moves)
        before = product(m, server.state)
        end = held(m, {k: v + sent.get(k, 0) for k, v in view.items()})
        cuts = first if spec in ("hlora", "flexlora") else held(m, view)
        assert server.receive(Update(jobs[c].id, c, 0, jobs[c].turn, sent)) is None
        assert server.step() is not None
        mixed = 0.75 * before + 0.25 * (first + end - cuts)
        expected = mixed if spec == "flexlora" else cut(mixed, 6)
        assert close(product(m, server.state), expected)
        assert not close(expected, before, 0.1)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
@pytest.mark.parametrize("spec", [*EFFECTIVE, "fedsvd"])
def test_server_optimizers_work_on_the_sum_of_products(spec: str, optimizer: str) -> None:
    m, plain = build(spec, rank=6, server_optimizer=optimizer, server_lr=0.1), build(spec, rank=6)
    state = small(m)
    fedavg = method.build({"name": "fedavg", "server_optimizer": optimizer, "server_lr": 0.1})
    dense = fedavg.init({"w": product(m, state)}, 0)
    for _ in range(3):
        sent = uploads(m, state, [6, 6])
        delta = product(plain, plain.step(state, sent, [1.0, 1.0])) - product(m, state)
        state = m.step(state, sent, [1.0, 1.0])
        dense = fedavg.step(dense, [Update(0, 0, 0, 0, {"w": delta})], [1.0])
        assert close(product(m, state), dense["params"]["w"], 1e-9)


# --- FedSVD ---------------------------------------------------------------------------------------------------------


def one_direction(client: int, start: Tree) -> Tree:
    return {M + B: torch.outer(draw(OUT, key=client), draw(len(start[M + A])))}


def outside(a: Tensor, span: Tensor) -> float:
    """How far the rows of `a` are from the span of the rows of the other."""
    q = torch.linalg.qr(span.mT)[0]
    return float((a - a @ q @ q.mT).abs().max())


@pytest.mark.parametrize("change", [moves, one_direction])
def test_fedsvd_is_exact_and_stays_in_the_span_of_its_first_a(change: Change) -> None:
    """Also of directions that nobody has moved yet."""
    m = build("fedsvd", rank=6)
    first = draw(6, INNER)
    state = begin(m, torch.zeros(OUT, 6).double(), first)
    for _ in range(20):
        after = ends(m, state, [6] * 3, change)[1]
        old, state = state, m.step(state, uploads(m, state, [6] * 3, change), [1.0, 2.0, 1.0])
        assert close(product(m, state), (after[0] + 2 * after[1] + after[2]) / 4)
        a = state["params"][M + A]
        assert outside(a, first) < 1e-10
        assert close(a @ a.mT, torch.eye(6).double())
        assert not close(a, old["params"][M + A], 1e-6)


def test_fedsvd_keeps_that_span_when_updates_of_several_versions_meet() -> None:
    m = build("fedsvd", rank=6)
    first = draw(6, INNER)
    states = [begin(m, torch.zeros(OUT, 6).double(), first)]
    for t in range(6):
        sent = [u for c, s in enumerate(states[-3:]) for u in uploads(m, s, [6 - c], clients=[10 * t + c])]
        states.append(m.step(states[-1], sent, [1.0] * len(sent)))
        assert outside(states[-1]["params"][M + A], first) < 1e-10


@pytest.mark.parametrize("sched", ["fedasync", {"name": "fedbuff", "buffer": 2}], ids=str)
def test_fedsvd_keeps_that_span_where_nobody_waits(sched: Any) -> None:
    w = language(meth={"name": "fedsvd", "rank": 2}, sched=sched, turns=6, layers=2).run()
    for k in (k for k in w.final if k.endswith(A)):
        assert outside(w.final[k].double(), w.iterates[0][k].double()) < 1e-5
        assert not torch.equal(w.final[k], w.iterates[1][k])


def test_fedsvd_clients_share_a_bit_for_bit_and_never_send_it() -> None:
    w = language(meth={"name": "fedsvd", "rank": 2}, turns=3).run()
    for t in range(3):
        for k in (k for k in w.final if k.endswith(A)):
            assert len({w.starts[c, t][k].numpy().tobytes() for c in range(3)}) == 1
    assert not torch.equal(w.starts[0, 1][k], w.starts[0, 2][k])
    assert all(n.endswith(B) for d in w.deltas.values() for n in d)
    m = build("fedsvd", rank=6)
    state = spread(m)
    sent = moves(0, m.send(state, Client(0), 0))
    assert M in str(m.check(state, Update(0, 0, 0, 0, sent)))


# --- what is written down -------------------------------------------------------------------------------------------


def test_the_error_of_hlora_is_the_tail_and_of_flexlora_nothing() -> None:
    for name in ("hlora", "hlora-delta", "raflora", "flexlora"):
        m = build(name, rank=5)
        state, ranks = spread(m), [1, 3, 4, 5]
        sent = uploads(m, state, ranks)
        after = m.step(state, sent, [1.0] * 4)
        flat = build(name, rank=18)
        wide = product(flat, flat.step(state, sent, [1.0] * 4))
        row = m.layers(state, sent, [1.0] * 4, [1.0] * 4, after)[M]
        tail = torch.linalg.svdvals(wide)[5:].norm() / wide.norm()
        assert row["error"] == pytest.approx(0 if name == "flexlora" else float(tail), abs=1e-7), name
        assert row["rank"] == pytest.approx(products.effective_rank(torch.linalg.svdvals(product(m, after))))


def test_each_step_writes_down_each_module() -> None:
    w = language(meth={"name": "hlora", "rank": 2}, turns=2, layers=2, ranks=[1, 2, 2])
    rows: list[Any] = []
    w.simulation.ledger.listener = lambda row: rows.append(row["layers"]) if row["what"] == "step" else None
    w.run()
    assert len(rows) == 2
    assert set(rows[0]) == set(modules(w.final))
    assert all(0 < x["error"] < 1 and 1 <= x["rank"] <= 2 for row in rows for x in row.values())


# --- what is refused ------------------------------------------------------------------------------------------------

BAD: dict[str, Tree] = {
    "a rank above the server's": {M + A: draw(7, INNER), M + B: draw(OUT, 7)},
    "factors of two ranks": {M + A: draw(4, INNER), M + B: draw(OUT, 3)},
    "too wide": {M + A: draw(4, INNER + 1), M + B: draw(OUT, 4)},
    "too short": {M + A: draw(4, INNER), M + B: draw(OUT - 1, 4)},
    "not a matrix": {M + A: draw(4), M + B: draw(OUT, 4)},
    "a number": {M + A: torch.tensor(1.0), M + B: draw(OUT, 4)},
    "another number": {M + B: torch.tensor(1.0)},
    "three dimensions": {M + A: draw(4, INNER), M + B: draw(OUT, 4, 1)},
    "no rank at all": {M + A: draw(0, INNER), M + B: draw(OUT, 0)},
    "nan": {M + A: torch.full((4, INNER), float("nan")), M + B: draw(OUT, 4)},
    "inf": {M + A: draw(4, INNER), M + B: torch.full((OUT, 4), float("inf"))},
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("spec", [*EFFECTIVE, "hetlora"])
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_lost(spec: str, what: str) -> None:
    m = build(spec, rank=6)
    server = Server(m, schedule.build("sync"), {M + A: draw(6, INNER), M + B: draw(OUT, 6)}, [Client(c) for c in range(3)], 3, 0)
    for version in range(2):  # FlexLoRA's server has a larger rank from the first step on
        jobs, before = {j.client: j for j in server.poll()}, server.state
        reason = server.receive(Update(jobs[0].id, 0, version, version, BAD[what]))
        assert reason is not None
        assert M in reason
        assert server.state is before
        for c in (1, 2):
            view = m.send(server.state, server.clients[c], version)
            sent = moves(c, {k: view[k] for k in (M + A, M + B)})
            assert server.receive(Update(jobs[c].id, c, version, version, sent)) is None
        step = server.step()
        assert step is not None
        assert step["updates"] == 2
    rest = m.init({M + A: draw(6, INNER), M + B: draw(OUT, 6)}, 0)
    for _ in range(2):
        rest = m.step(rest, uploads(m, rest, [6, 6], clients=[1, 2]), [1.0, 1.0])
    assert close(product(m, rest), product(m, server.state))


@pytest.mark.parametrize("spec", [*EFFECTIVE, "hetlora"])
def test_a_rank_above_the_clients_own_is_refused(spec: str) -> None:
    m = build(spec, rank=6)
    ranks = [Client(0, 1, {"rank": 2}), Client(1)]
    server = Server(m, schedule.build("sync"), {M + A: draw(6, INNER), M + B: draw(OUT, 6)}, ranks, 1, 0)
    jobs = {j.client: j for j in server.poll()}
    sent = {M + A: draw(3, INNER), M + B: draw(OUT, 3)}
    assert server.receive(Update(jobs[1].id, 1, 0, 0, sent)) is None
    assert "with r up to 2" in str(server.receive(Update(jobs[0].id, 0, 0, 0, sent)))


def test_other_tensors_are_checked_and_averaged_as_ever() -> None:
    m = build("hlora", rank=6)
    state = m.init({M + A: draw(6, INNER), M + B: draw(OUT, 6), "head": draw(3)}, 0)
    for bad in ({"head": draw(4)}, {"head": torch.full((3,), float("nan"))}, {"x": draw(3)}, {"y" + A: draw(2, INNER)}):
        assert next(iter(bad)) in str(m.check(state, Update(0, 0, 0, 0, bad)))
    sent = uploads(m, state, [2, 6])
    after = m.step(state, sent, [1.0, 3.0])["params"]["head"]
    assert close(after, state["params"]["head"] + (sent[0].payload["head"] + 3 * sent[1].payload["head"]) / 4)


# --- and what it is worth -------------------------------------------------------------------------------------------

RANKS = [2, 2, 2, 4, 4, 8, 8, 16]


def excess(spec: Any, rate: float, seed: int, rounds: int = 30, steps: int = 10) -> float:
    """What is left of the loss that aggregation can remove, when eight clients fit a 32 x 32 matrix of rank 12 each, by
    gradient descent on their factors; their matrices differ a little."""
    common = draw(32, 12, key=seed) @ draw(12, 32, key=seed) / 32
    goals = [common + 0.3 * draw(32, 4, key=(seed, c)) @ draw(4, 32, key=(seed, c)) / 32 for c in range(8)]
    m = method.build({**spec, "rank": 16, "alpha": 16.0, "scaling": "constant"})
    state = m.init({M + A: (draw(16, 32)).sign() / 32**0.5, M + B: torch.zeros(32, 16).double()}, seed)

    def descend(client: int, start: Tree) -> Tree:
        a, b = (x.clone() for x in pair(start, M))
        for _ in range(steps):
            gap = b @ a - goals[client]
            a, b = a - rate * b.mT @ gap, b - rate * gap @ a.mT
        return {M + A: a - start[M + A], M + B: b - start[M + B]}

    for _ in range(rounds):
        state = m.step(state, uploads(m, state, RANKS, descend), [1.0] * 8)
    best = sum(goals) / 8
    return float((product(m, state) - best).square().sum() / best.square().sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_zero_padding_loses_more_than_hlora_and_hlora_more_than_hlora_delta(seed: int) -> None:
    """Each at its best rate."""
    pad, hlora, delta = (min(excess(s, r, seed) for r in (0.1, 0.3, 0.5)) for s in (PLAIN, {"name": "hlora"}, {"name": "hlora-delta"}))
    assert pad > 1.3 * hlora
    assert hlora > 5 * delta
    assert delta < 0.03


@pytest.mark.parametrize("spec", [*EFFECTIVE, "fedsvd", "hetlora"])
def test_a_preloaded_client_is_sent_nothing_until_something_changed(spec: str) -> None:
    """It holds the start model, and a cut of that is no news."""
    m = build(spec, rank=6)
    ranks = [Client(c, 1, {"rank": r}) for c, r in enumerate((3, 6))]
    server = Server(m, schedule.build("sync"), {M + A: draw(6, INNER), M + B: draw(OUT, 6)}, ranks, 2, 0)
    for version in range(2):
        for job in server.poll():
            assert set(job.payload) == ({M + A, M + B} if version else set())
            view = m.send(server.state, server.clients[job.client], version)
            sent = moves(job.client, {k: view[k] for k in ((M + B,) if spec == "fedsvd" else (M + A, M + B))})
            assert server.receive(Update(job.id, job.client, version, version, sent)) is None
        assert server.step() is not None
