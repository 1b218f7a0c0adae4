"""Asynchronous schedules against their papers: by hand on the bare server, and against an independent event loop on
quadratics, in float64."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Quadratics, World, quadratic

from hocket.clock import Device
from hocket.methods import Client, Update, method
from hocket.schedules import schedule
from hocket.server import Server
from hocket.tree import digest

N, K, LR = 5, 3, 0.1
SLOW = [x**0.5 for x in (1, 2, 5, 13, 23)]  # no two sums of these are equal, so nothing arrives at one time
EVERY = ["fedasync", "fedbuff", "fadas", "fedfa", "ca2fl", "port", "safa"]


# --- the bare server, updates by hand ----------------------------------------------------------------------------------
def bare(sched: Any, clients: int = 4, start: float = 0.0, turns: int = 1000, meth: Any = "fedavg") -> Server:
    s = schedule.build(sched)
    params = {"w": torch.full((2,), start, dtype=torch.float64)}
    return Server(s.adapt(method.build(meth)), s, params, [Client(i) for i in range(clients)], turns, 0)


def ask(s: Server) -> dict[int, Any]:
    """The jobs of this instant, by client."""
    return {j.client: j for j in s.poll()}


def tell(s: Server, job: Any, value: Any, weight: float = 1.0, **more: Any) -> str | None:
    s.computed(job)
    x = torch.as_tensor(value, dtype=torch.float64).expand(2).clone()
    return s.receive(Update(job.id, job.client, job.version, job.turn, {"w": x}, weight, **more))


def now(s: Server) -> float:
    assert float(s.state["params"]["w"].std(correction=0)) == 0
    return float(s.state["params"]["w"][0])


def advance(s: Server, job: Any, value: float, weight: float = 1.0) -> Any:
    assert tell(s, job, value, weight) is None
    return s.step()


def test_a_stale_delta_is_added_and_never_replaces() -> None:
    """A client that started at 0 and ended at 1, heard when the model is at 10: two peers give 1, the paper 11."""
    s = bare({"name": "fedbuff", "buffer": 1, "fading": "constant"}, clients=2)
    jobs = ask(s)
    advance(s, jobs[0], 10.0)
    assert now(s) == 10.0
    record = advance(s, jobs[1], 1.0)
    assert now(s) == 11.0
    assert record["staleness"] == 1


def test_a_fresh_update_counts_fully_and_a_stale_one_by_the_root() -> None:
    """A peer raises the version before it weighs, and uses 1 / (1 + sqrt tau): 0.5 for a fresh update."""
    s = bare({"name": "fedbuff", "buffer": 1}, clients=9)
    jobs = ask(s)
    assert advance(s, jobs[0], 1.0)["weight"] == 1.0
    assert now(s) == 1.0
    before = now(s)
    for tau in range(1, 9):
        record = advance(s, jobs[tau], 1.0)
        assert record["staleness"] == tau
        assert record["weight"] == (1 + tau) ** -0.5
        assert now(s) == before + (1 + tau) ** -0.5
        before = now(s)


def test_a_stale_update_makes_the_step_smaller_not_the_others_larger() -> None:
    s = bare({"name": "fedbuff", "buffer": 2}, clients=4)
    jobs = ask(s)
    tell(s, jobs[0], 0.0)
    advance(s, jobs[1], 0.0)
    fresh = ask(s)
    tell(s, jobs[2], 4.0, weight=3.0)  # one behind
    advance(s, fresh[0], 8.0, weight=1.0)
    assert now(s) == pytest.approx((3 * 4 / math.sqrt(2) + 8) / 4, abs=1e-15)


@pytest.mark.parametrize(
    ("fading", "factor"),
    [
        ("constant", lambda t: 1.0),
        ("polynomial", lambda t: (1 + t) ** -0.7),
        ("hinge", lambda t: 1.0 if t <= 2 else 1 / (10 * (t - 2) + 1)),
    ],
)
def test_fedasync_mixes_models_and_alpha_does_not_accumulate(fading: Any, factor: Callable[[int], float]) -> None:
    a = {"constant": 0.5, "polynomial": 0.7, "hinge": 10.0}[fading]
    s = bare({"name": "fedasync", "alpha": 0.6, "fading": fading, "a": a, "b": 2.0}, clients=7, start=3.0)
    jobs, theta, starts = ask(s), 3.0, {}
    for tau in range(7):
        alpha = 0.6 * factor(tau)
        record = advance(s, jobs[tau], 1.0 + tau)
        theta = (1 - alpha) * theta + alpha * (3.0 + 1.0 + tau)
        assert record["staleness"] == tau
        assert record["weight"] == pytest.approx(alpha, abs=1e-16)
        assert now(s) == pytest.approx(theta, abs=1e-14)
        starts[tau] = theta
    again = ask(s)
    before = now(s)
    assert advance(s, again[0], 1.0)["weight"] == 0.6  # Plato multiplies its own alpha by s(tau), arrival by arrival
    assert now(s) == pytest.approx(0.4 * before + 0.6 * (before + 1), abs=1e-14)


def test_the_hinge_and_its_friends() -> None:
    def fade(fading: str, a: float, b: float, *staleness: int) -> list[float]:
        s = schedule.build({"name": "fedasync", "fading": fading, "a": a, "b": b})
        return [s.discount(t) for t in staleness]

    assert fade("hinge", 10.0, 4.0, 0, 4, 5, 6) == [1.0, 1.0, 1 / 11, 1 / 21]
    assert fade("polynomial", 0.5, 4.0, 0, 3) == [1.0, 0.5]
    assert fade("constant", 9.0, 0.0, 99) == [1.0]


def test_fedasync_mixes_only_tensors_that_came() -> None:
    s = schedule.build({"name": "fedasync", "alpha": 1.0, "fading": "constant"})
    params = {k: torch.zeros(1, dtype=torch.float64) for k in "ab"}
    server = Server(method.build("fedavg"), s, params, [Client(0), Client(1)], 9, 0)
    jobs = ask(server)
    one = torch.ones(1, dtype=torch.float64)
    server.receive(Update(jobs[0].id, 0, 0, 0, {"a": one}))
    server.step()
    server.receive(Update(jobs[1].id, 1, 0, 0, {"b": one}))
    server.step()
    assert {k: float(v) for k, v in server.state["params"].items()} == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("adaptive", ["code", "formula", "none"])
@pytest.mark.parametrize(("tau_c", "lr"), [(1, 0.5), (2, 0.5), (1, 1e-3)])
def test_fadas_is_amsgrad_on_the_mean_with_a_rate_that_falls(adaptive: str, tau_c: int, lr: float) -> None:
    b1, b2, eps = 0.9, 0.99, 1e-8
    s = bare({"name": "fadas", "buffer": 2, "lr": lr, "adaptive": adaptive, "tau_c": tau_c}, clients=4)
    jobs = ask(s)
    plan = [((0, 1.0), (1, 3.0)), ((2, -4.0), (0, 1.0)), ((0, 0.25), (1, 0.5)), ((3, 2.0), (0, -1.0))]
    stalest = [0, 1, 1, 3]  # clients 2 and 3 started at version 0, client 1 at version 1
    theta = m = v = top = 0.0
    for ((c, x), (d, y)), tau in zip(plan, stalest, strict=True):
        tell(s, jobs[c], x)
        record = advance(s, jobs[d], y)
        mean = (x + y) / 2
        m = b1 * m + (1 - b1) * mean
        v = b2 * v + (1 - b2) * mean**2
        top = max(top, v)
        slow = tau > tau_c
        rate = {"code": lr / tau, "formula": min(lr, 1 / tau), "none": lr}[adaptive] if slow else lr
        theta += rate * m / (math.sqrt(top) + eps)
        assert record["stalest"] == tau
        assert now(s) == pytest.approx(theta, rel=1e-13, abs=1e-13)
        jobs |= ask(s)
    slot = s.state["slots"]["w"]
    assert [float(slot[k][0]) for k in ("m", "v", "top")] == pytest.approx([m, v, top], rel=1e-13)


def port_world() -> tuple[Server, dict[int, Any]]:
    """Version 2 at (2, 0); client 3 still at work since version 0, client 1 since version 1."""
    s = bare({"name": "port", "buffer": 1, "bound": 4, "similarity": 1.0, "freshness": 3.0}, clients=4)
    jobs = ask(s)
    for c in (0, 1):
        assert tell(s, jobs[c], [1.0, 0.0]) is None
        assert s.step() is not None
        jobs |= ask(s)
    return s, jobs


def test_ports_weights_by_hand() -> None:
    s, jobs = port_world()
    s.schedule = replace(s.schedule, buffer=3)
    tell(s, jobs[3], [1.0, 1.0], weight=2.0)  # since version 0 the model moved along (1, 0): cosine 1 / sqrt 2
    tell(s, jobs[0], [-1.0, 0.0])  # since version 1 along (1, 0): cosine -1
    tell(s, jobs[1], [0.0, 5.0])  # fresh: cosine 1
    record = s.step()
    assert record["staleness"] == 1.0
    p = [1 * (0 + 3 * 4 / 5), 2 * ((1 + 0.5**0.5) / 2 + 3 * 4 / 6), 1 * (1 + 3.0)]
    want = [2 + (-p[0] + p[1]) / sum(p), (p[1] + 5 * p[2]) / sum(p)]
    assert s.state["params"]["w"].tolist() == pytest.approx(want, abs=1e-14)


def test_ports_cosine_is_one_where_nothing_happened() -> None:
    s = bare({"name": "port", "buffer": 1}, clients=2)
    jobs = ask(s)
    advance(s, jobs[0], 0.0)  # a version later, at the same place
    before = s.schedule._worth(s, Update(jobs[1].id, 1, 0, 0, {"w": -torch.ones(2, dtype=torch.float64)}))
    assert before == 1.0 + 3.0 * 10 / 11


def test_port_waits_beyond_its_bound_and_goes_on_when_the_slow_one_is_heard_or_lost() -> None:
    for end in ("heard", "lost"):
        s = bare({"name": "port", "buffer": 1, "bound": 2}, clients=2)
        jobs = ask(s)
        slow = jobs[1]
        for _ in range(2):
            assert advance(s, jobs[0], 1.0) is not None
            jobs |= ask(s)
        assert s.version - slow.version == 2  # a further step would make its update three versions stale
        assert advance(s, jobs[0], 1.0) is None
        if end == "heard":
            assert advance(s, slow, 1.0) is not None
        else:
            s.lost(slow)
            assert s.step() is not None


# --- staleness, deadlines, concurrency ---------------------------------------------------------------------------------
@pytest.mark.parametrize("sched", EVERY)
def test_max_staleness_refuses_and_says_why(sched: str) -> None:
    fields = {"buffer": 1} if sched in ("fedbuff", "fadas", "ca2fl", "port") else {}
    s = bare({"name": sched, "max_staleness": 1, **fields}, clients=2)
    jobs = ask(s)
    slow = jobs[1]
    for _ in range(2):
        advance(s, jobs[0], 1.0)
        jobs |= ask(s)
    before = digest(s.state["params"])
    reason = tell(s, slow, 1.0)
    assert reason == "late: it started 2 versions ago; schedule.max_staleness is 1"
    assert s.step() is None
    assert digest(s.state["params"]) == before
    assert slow.client in ask(s)  # it is asked anew


@pytest.mark.parametrize("sched", EVERY)
def test_a_deadline_gives_slow_jobs_up(sched: str) -> None:
    fast, slow = Device(step_seconds=0.1), Device(step_seconds=100.0)
    w = quadratic(meth="fedavg", turns=12, sched={"name": sched, "deadline": 5.0}, devices=[fast, fast, slow])
    rows: list[dict[str, Any]] = []
    w.simulation.ledger.listener = rows.append
    assert all(j.deadline == 5.0 for j in quadratic(sched={"name": sched, "deadline": 5.0}).simulation.server.poll())
    w.simulation.run()
    assert {r["client"] for r in rows if r["what"] == "up"} == {0, 1}
    assert {(r["client"], r["reason"]) for r in rows if r["what"] == "lost"} <= {(2, "deadline")}


def watched(sched: Any, check: Callable[[Server], None], turns: int = 25, clients: int = N, **more: Any) -> World:
    """A run in which `check` looks at the server after every change."""
    more = {"devices": devices(SLOW[:clients]), "meth": "fedavg", **more}
    w = quick(quadratic(clients=clients, turns=turns, sched=sched, **more), Problem(clients))
    server = w.simulation.server
    poll, step = server.poll, server.step

    def polling() -> Any:
        jobs = poll()
        check(server)
        return jobs

    def stepping() -> Any:
        record = step()
        check(server)
        return record

    server.poll, server.step = polling, stepping  # type: ignore[method-assign]
    w.simulation.run()
    return w


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("sched", EVERY)
def test_concurrency_holds_at_every_instant(sched: str, loss: float) -> None:
    most = 0

    def check(server: Server) -> None:
        nonlocal most
        busy = [j.client for j in server.outstanding.values()]
        assert len(busy) == len(set(busy)) <= 3
        most = max(most, len(busy))

    fields = {"quota": 0.4} if sched == "safa" else {}
    watched({"name": sched, "concurrency": 3, **fields}, check, loss=loss)
    assert most == 3


@pytest.mark.parametrize("concurrency", [1, 2, 3])
@pytest.mark.parametrize("sched", ["fedasync", "fedbuff", "fedfa", "ca2fl"])
def test_fair_selection_asks_everybody_as_often(sched: str, concurrency: int) -> None:
    def check(server: Server) -> None:
        visits = [server.visits.get(c, 0) for c in range(N)]
        assert max(visits) - min(visits) <= 1

    watched({"name": sched, "concurrency": concurrency, "selection": "fair"}, check, devices=devices([2.0] * N))


def test_random_selection_is_not_fair_but_leaves_nobody_out() -> None:
    gaps = []
    spread = lambda s: gaps.append(max(v := [s.visits.get(c, 0) for c in range(N)]) - min(v))
    watched({"name": "fedasync", "concurrency": 2}, spread, turns=60, devices=devices([2.0] * N))
    assert 1 < max(gaps) < 15


# --- what the server holds -----------------------------------------------------------------------------------------------
KINDS: list[dict[str, Any]] = [
    *({"name": x} for x in EVERY),
    {"name": "fedfa", "form": "model"},
    {"name": "fedfa", "form": "model", "start": "wait", "window": 3},
    {"name": "ca2fl", "caches": "clients"},
]


@pytest.mark.parametrize("sched", KINDS, ids=lambda s: "-".join(map(str, s.values())))
def test_versions_are_freed(sched: dict[str, Any]) -> None:
    """Nothing is kept but what jobs, the buffer, kept updates or an empty place's start model refer to."""
    build = schedule.build(sched)

    def check(server: Server) -> None:
        if not build.anchored:
            assert server.versions == {}
            return
        updates = [*server.buffer, *server.kept]
        assert set(server.versions) >= {u.version for u in updates} | {j.version for j in server.outstanding.values()}
        extra = N if sched["name"] == "safa" else 1  # models that stand in caches
        assert len(server.versions) <= len(server.outstanding) + len(updates) + extra + 1

    w = watched(sched, check, turns=40, loss=0.2)
    server = w.simulation.server
    kept = {"ca2fl": N if not build.carries else 0, "safa": N, "fedfa": getattr(build, "window", 0)}
    assert len(server.kept) <= kept.get(sched["name"], 0)


def test_the_ledger_says_what_the_server_holds() -> None:
    size = 12 * 8  # numbers and their bytes
    models = {"fedbuff": 1, "fadas": 4, "ca2fl": 2, "fedfa": 1}  # parameters; and three moments; and the sum of caches
    for sched in KINDS:
        rows: list[dict[str, Any]] = []
        w = quadratic(clients=N, meth="fedavg", turns=25, sched=sched, devices=devices(SLOW))
        w.simulation.ledger.listener = rows.append
        quick(w, Problem()).simulation.run()
        steps = [r for r in rows if r["what"] == "step"]
        packet = next(r["bytes"] for r in rows if r["what"] == "up")
        assert len(steps) == 25
        for r in steps[2:]:  # as the step found it; after the first, AMSGrad's maximum is its second moment
            assert {"versions", "kept", "memory", "packets", "staleness", "stalest", "updates"} <= set(r)
            assert r["packets"] == packet * (r["kept"] + r["updates"])  # nothing is left over where nothing ties
            if not schedule.build(sched).anchored:
                assert r["versions"] == 0
                assert r["memory"] == size * models[sched["name"]]
            else:
                assert size <= r["memory"] <= size * (1 + r["versions"])
        last = {"ca2fl": N, "safa": N, "fedfa": 4}.get(sched["name"], 0)
        last = 0 if sched.get("caches") == "clients" else sched.get("window", last)
        assert steps[-1]["kept"] == last


# --- quadratics: an independent event loop -----------------------------------------------------------------------------
def devices(durations: list[float], steps: int = K) -> list[Device]:
    """Free links, so that a job takes its duration exactly."""
    return [Device(step_seconds=d / steps, down_mb_s=math.inf, up_mb_s=math.inf) for d in durations]


class Problem:
    """The quadratics of `worlds`, and gradient descent on them without a trainer."""

    def __init__(self, clients: int = N, lr: float = LR, steps: int = K, size: int = 3) -> None:
        model = Quadratics(clients, 4, size, False)
        self.H, self.c, self.lr, self.steps = model.H, model.c, lr, steps
        eye = torch.eye(4 * size, dtype=torch.float64)
        self.map = [eye - torch.linalg.matrix_power(eye - lr * h, steps) for h in self.H]

    def local(self, client: int, x: Tensor) -> Tensor:
        end = x
        for _ in range(self.steps):
            end = end - self.lr * self.H[client] @ (end - self.c[client])
        return end - x

    def fixed(self) -> Tensor:
        """Where synchronous FedAvg stands still: sum_i (I - (I - lr H_i)^K) (x - c_i) = 0."""
        return torch.linalg.solve(sum(self.map), sum(a @ c for a, c in zip(self.map, self.c, strict=True)))


def reference(rule: Any, durations: list[float], turns: int, problem: Problem | None = None) -> list[Tensor]:
    """Iterates of a rule `rule(client, theta_start, delta, staleness) -> True if it made a version`."""
    problem = problem or Problem()
    starts = [(rule.theta, 0)] * len(durations)
    out, version = [rule.theta], 0
    jobs = {j.client: j.id for j in quadratic(clients=len(durations), sched="fedasync").simulation.server.poll()}
    heap = [(d, c) for c, d in enumerate(durations)]
    heapq.heapify(heap)
    while version < turns:
        t, c = heapq.heappop(heap)
        start, then = starts[c]
        rule.job = jobs[c]
        if rule(c, start, problem.local(c, start), version - then):
            version += 1
            out.append(rule.theta)
        starts[c] = rule.theta, version
        jobs[c] = max(jobs.values()) + 1
        heapq.heappush(heap, (t + durations[c], c))
    return out


def flat(tree: Any) -> Tensor:
    return torch.cat([tree[f"layers.{i}.w"] for i in range(4)])


def quick(w: World, problem: Problem) -> World:
    """The same federation with the formula in place of the trainer, which takes a hundred times as long."""

    def fit(local: Any, start: Any, only: Any, prox: float, *more: Any) -> Any:
        delta = problem.local(local.client, flat(start)).split(len(start["layers.0.w"]))
        return {f"layers.{i}.w": x.clone() for i, x in enumerate(delta) if only(f"layers.{i}.w")}

    w.trainer.fit = fit
    return w


def run(sched: Any, durations: list[float] | None = None, turns: int = 40, trainer: bool = False, **more: Any) -> World:
    more = {"clients": N, "meth": "fedavg", "lr": LR, "steps": K, **more}
    w = quadratic(turns=turns, sched=sched, devices=devices(durations or SLOW, more["steps"]), **more)
    return (w if trainer else quick(w, Problem(more["clients"], more["lr"], more["steps"]))).run()


def close(w: World, want: list[Tensor], atol: float = 1e-12) -> bool:
    same = len(w.iterates) == len(want)
    return same and all(torch.allclose(flat(a), b, atol=atol, rtol=0) for a, b in zip(w.iterates, want, strict=True))


class Rule:
    def __init__(self, weights: list[float] | None = None) -> None:
        self.theta = torch.zeros(12, dtype=torch.float64)
        self.n = weights or [1.0] * N


class Mixing(Rule):
    def __call__(self, c: int, start: Tensor, delta: Tensor, tau: int) -> bool:
        alpha = 0.6 * (1 + tau) ** -0.5
        self.theta = (1 - alpha) * self.theta + alpha * (start + delta)
        return True


def test_fedasync_against_an_independent_loop() -> None:
    for trainer in (True, False):
        assert close(run("fedasync", trainer=trainer), reference(Mixing(), SLOW, 40))


class Buffering(Rule):
    def __init__(self, size: int, weights: list[float] | None = None) -> None:
        super().__init__(weights)
        self.size, self.held = size, []

    def __call__(self, c: int, start: Tensor, delta: Tensor, tau: int) -> bool:
        self.held.append((self.n[c], (1 + tau) ** -0.5, delta))
        if len(self.held) < self.size:
            return False
        self.theta = self.theta + sum(n * s * d for n, s, d in self.held) / sum(n for n, _, _ in self.held)
        self.held = []
        return True


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_fedbuff_against_an_independent_loop(size: int) -> None:
    weights = [1, 2, 3, 1, 5]
    w = run({"name": "fedbuff", "buffer": size}, weights=weights)
    assert close(w, reference(Buffering(size, [float(n) for n in weights]), SLOW, 40))


class Window(Rule):
    """FedFa: a queue of client models, or of differences."""

    def __init__(self, size: int, start: str, form: str, total: str = "1", weights: list[float] | None = None) -> None:
        super().__init__(weights)
        self.size, self.form, self.total = size, form, total
        blank = self.theta if form == "model" else torch.zeros_like(self.theta)
        self.queue = [(1.0, blank)] * size if start == "fill" else []
        self.waiting: list[Any] | None = [] if start == "wait" else None

    def __call__(self, c: int, start: Tensor, delta: Tensor, tau: int) -> bool:
        evicted = self.queue[0][1] if len(self.queue) == self.size else None
        new = self.n[c], start + delta if self.form == "model" else delta
        if self.waiting is None:
            self.queue = [*self.queue, new][-self.size :]
        else:
            self.waiting.append((self.job, new))
            if len(self.waiting) < self.size:
                return False
            # the first window is in the order of asking, since a server without a clock knows no other (see below)
            self.queue, self.waiting = [x for _, x in sorted(self.waiting, key=lambda x: x[0])], None
        mean = sum(n * x for n, x in self.queue) / sum(n for n, _ in self.queue)
        if self.form == "delta":
            self.theta = self.theta + mean / (1 if self.total == "1" else self.size)
            return True
        if evicted is not None and len(set(self.n)) == 1:  # the paper's way to say it
            assert torch.allclose(mean, self.theta + (start + delta - evicted) / self.size, atol=1e-13)
        self.theta = mean
        return True


@pytest.mark.parametrize("start", ["wait", "fill"])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_fedfas_models_are_a_queue_of_models(size: int, start: str) -> None:
    w = run({"name": "fedfa", "form": "model", "start": start, "window": size})
    assert close(w, reference(Window(size, start, "model"), SLOW, 40))


@pytest.mark.parametrize("total", ["1", "1/Q"])
@pytest.mark.parametrize("start", ["wait", "fill"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_fedfas_differences_act_q_times(size: int, start: str, total: str) -> None:
    w = run({"name": "fedfa", "form": "delta", "start": start, "window": size, "total_weight": total})
    assert close(w, reference(Window(size, start, "delta", total), SLOW, 40))


@pytest.mark.parametrize("form", ["model", "delta"])
def test_fedfas_window_weighs_clients(form: str) -> None:
    weights = [1, 2, 3, 1, 5]
    w = run({"name": "fedfa", "form": form, "start": "wait", "window": 3, "total_weight": "1"}, weights=weights)
    assert close(w, reference(Window(3, "wait", form, "1", [float(n) for n in weights]), SLOW, 40))


def test_fedfas_difference_comes_to_its_total_weight() -> None:
    for total, comes_to in (("1", 1.0), ("1/Q", 0.25)):
        s = bare({"name": "fedfa", "window": 4, "total_weight": total}, clients=1)
        path = []
        for x in [1.0, *[0.0] * 6]:
            advance(s, ask(s)[0], x)
            path.append(now(s))
        assert path == [comes_to * min(i, 4) / 4 for i in range(1, 8)]


def test_a_window_of_one_is_fedasync_with_alpha_one() -> None:
    for start in ("wait", "fill"):
        a = run({"name": "fedfa", "form": "model", "window": 1, "start": start})
        b = run({"name": "fedasync", "alpha": 1.0, "fading": "constant"})
        assert [digest(x) for x in a.iterates] == [digest(x) for x in b.iterates]


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 1, 5]])
def test_a_full_window_at_equal_speeds_is_fedavg_at_every_instant(weights: Any) -> None:
    sync = run("sync", [2.0] * N, turns=6, weights=weights)
    w = run({"name": "fedfa", "form": "model", "window": N, "start": "wait"}, [2.0] * N, 1 + 5 * N, weights=weights)
    first = digest(w.iterates[1])
    assert torch.allclose(flat(w.iterates[1]), flat(sync.iterates[1]), atol=1e-15)
    assert first
    for instant in range(6):
        assert torch.allclose(flat(w.iterates[1 + instant * N]), flat(sync.iterates[1 + instant]), atol=1e-13)


@pytest.mark.parametrize("sched", ["fedbuff", "ca2fl", "port"])
@pytest.mark.parametrize("weights", [None, [1, 2, 3, 1, 5]])
def test_a_full_buffer_at_equal_speeds_is_fedavg(sched: str, weights: Any) -> None:
    """All arrivals of an instant are heard before anybody is asked again; else this held for one round only. With
    everybody's update fresh, CA2FL's caches cancel and Port's weights are equal."""
    sync = run("sync", [2.0] * N, turns=8, weights=weights)
    w = run({"name": sched, "buffer": N}, [2.0] * N, turns=8, weights=weights)
    for a, b in zip(w.iterates, sync.iterates, strict=True):
        assert torch.allclose(flat(a), flat(b), atol=1e-13)
    assert w.simulation.clock.now == sync.simulation.clock.now == 16.0


def test_safa_with_everybody_at_equal_speeds_is_fedavg() -> None:
    sync = run("sync", [2.0] * N, turns=8)
    w = run({"name": "safa", "quota": 1.0}, [2.0] * N, turns=8)
    for a, b in zip(w.iterates, sync.iterates, strict=True):
        assert torch.allclose(flat(a), flat(b), atol=1e-13)


class Calibrating(Rule):
    """CA2FL; the weight of those not yet heard is the mean of the others'."""

    def __init__(self, size: int, news: str, weights: list[float] | None = None, twice: bool = False) -> None:
        super().__init__(weights)
        self.size, self.news = size, news
        self.cache: dict[int, Tensor] = {}
        self.held: list[tuple[int, Tensor]] = []
        self.repeats = 0

    def __call__(self, c: int, start: Tensor, delta: Tensor, tau: int) -> bool:
        self.repeats += c in {i for i, _ in self.held}
        self.held.append((c, delta))
        if len(self.held) < self.size:
            return False
        heard = {*self.cache, *(i for i, _ in self.held)}
        everybody = sum(self.n[i] for i in heard) / len(heard) * N
        zero = torch.zeros_like(self.theta)
        h = sum((self.n[i] * x for i, x in self.cache.items()), zero) / everybody
        news = sum(self.n[i] * (x - self.cache.get(i, zero)) for i, x in self.held)
        divisor = everybody if self.news == "clients" else sum(self.n[i] for i, _ in self.held)
        self.theta = self.theta + h + news / divisor
        self.cache |= dict(self.held)
        self.held = []
        return True


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 1, 5]])
@pytest.mark.parametrize("news", ["buffer", "clients"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_ca2fl_against_an_independent_loop(size: int, news: str, weights: Any) -> None:
    rule = Calibrating(size, news, weights and [float(n) for n in weights])
    assert close(run({"name": "ca2fl", "buffer": size, "news": news}, weights=weights), reference(rule, SLOW, 40))
    assert rule.repeats > 0 or size == 1  # a client that reports twice is measured against its cache both times


ALIKE = [1.0, 1.07, 1.13, 1.22, 1.31]


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 1, 5]])
@pytest.mark.parametrize("meth", ["fedavg", {"name": "fedbcd", "layers_per_block": 1}], ids=["fedavg", "fedbcd"])
def test_caches_at_clients_are_those_at_the_server(meth: Any, weights: Any) -> None:
    one = run({"name": "ca2fl", "buffer": 2}, ALIKE, meth=meth, weights=weights)
    batches: list[list[int]] = []
    two = quadratic(
        clients=N, meth=meth, lr=LR, steps=K, turns=40, weights=weights, devices=devices(ALIKE),
        sched={"name": "ca2fl", "buffer": 2, "caches": "clients"},
    )  # fmt: skip
    quick(two, Problem())
    takes = type(two.simulation.server.schedule).takes
    object.__setattr__(
        two.simulation.server.schedule, "takes", lambda s: batches.append([u.client for u in takes(s.schedule, s)]) or takes(s.schedule, s)
    )
    two.run()
    assert len(batches) == 40
    assert all(len(set(b)) == 2 for b in batches)
    for a, b in zip(one.iterates, two.iterates, strict=True):
        assert torch.allclose(flat(a), flat(b), atol=1e-12)
    assert two.simulation.server.kept == []


@pytest.mark.parametrize("up", ["raw", "int8", {"name": "topk", "share": 0.3}], ids=["raw", "int8", "topk"])
@pytest.mark.parametrize("meth", ["fedavg", {"name": "fedbcd", "layers_per_block": 1}], ids=["fedavg", "fedbcd"])
def test_with_lost_clients_both_ends_still_agree_on_the_caches(meth: Any, up: Any) -> None:
    """After every event: the server's sum is that of what clients know to have been counted, be it that updates were
    lost after the client had sent them (late) or before (crash)."""
    sched = {"name": "ca2fl", "buffer": 3, "caches": "clients", "max_staleness": 4, "deadline": 4.0}
    weights = [1, 2, 3, 1, 5]
    w = quadratic(clients=N, meth=meth, turns=30, sched=sched, up=up, loss=0.25, weights=weights, devices=devices(SLOW))
    quick(w, Problem())
    sim, server = w.simulation, w.simulation.server
    compared = 0

    def check() -> None:
        nonlocal compared
        want: dict[str, Tensor] = {}
        for c, where in sim.memory.items():
            newest: dict[str, int] = {}
            memory = sim.spool.get(where)
            for key in memory:
                _, visit, name = key.split("/", 2)
                if name.startswith("carried/") and int(visit) <= server.heard.get(c, -1):
                    newest[name] = max(newest.get(name, -1), int(visit))
            for name, visit in newest.items():
                x, k = weights[c] * memory[f"sent/{visit}/{name}"], name.removeprefix("carried/")
                want[k] = want[k] + x if k in want else x
        have = dict(server.notes.get("sums", {}))
        for u in server.buffer:
            for k in u.payload:
                have[k] = have[k] + u.weight * u.payload[k] if k in have else u.weight * u.payload[k]
        assert set(have) == set(want)
        for k in have:
            assert torch.allclose(have[k], want[k], atol=1e-12)
            compared += 1

    sim.on_event = check
    sim.run()
    assert sim.ledger.losses > 10
    assert compared > 100


def test_the_sum_of_caches_does_not_drift_in_half_precision() -> None:
    """`combine.mean` adds half precision in fp32; a sum over a whole run needs it more."""
    s = schedule.build({"name": "ca2fl", "buffer": 1})
    start = {"w": torch.zeros(64, dtype=torch.bfloat16)}
    server = Server(method.build("fedavg"), s, start, [Client(i) for i in range(4)], 2000, 0)
    g, last = torch.Generator().manual_seed(0), {}
    for _ in range(500):
        server.poll()
        job = next(iter(server.outstanding.values()))
        last[job.client] = 0.01 * torch.randn(64, generator=g).bfloat16()
        server.receive(Update(job.id, job.client, job.version, job.turn, {"w": last[job.client]}))
        assert server.step() is not None
    want = sum(x.float() for x in last.values())
    assert float((server.notes["sums"]["w"].float() - want).norm() / want.norm()) < 0.004  # bf16 rounds to 2^-8


# --- SAFA -----------------------------------------------------------------------------------------------------------------
def safa(durations: list[float], turns: int, quota: int, tolerance: int, problem: Problem) -> tuple[list[Tensor], set[str]]:
    """SAFA's three kinds of clients, written from the paper; equal weights, no two arrivals at one time."""
    n = len(durations)
    theta = torch.zeros(12, dtype=torch.float64)
    cache, out, version, seen = [theta] * n, [theta], 0, set()
    work = {c: (durations[c], theta, 0) for c in range(n)}  # client -> (end, start model, start version)
    heard: set[int] = set()
    while version < turns:
        c = min(work, key=lambda c: work[c][0])
        t, start, then = work.pop(c)
        if version - then > tolerance:  # deprecated: its cache is a newer model already
            seen.add("deprecated")
            work[c] = t + durations[c], theta, version
            continue
        seen.add("tolerable" if version > then else "up to date")
        cache[c] = start + problem.local(c, start)
        heard.add(c)
        if len(heard) == quota:
            theta = sum(cache) / n
            version += 1
            out.append(theta)
            for i in heard:
                work[i] = t + durations[i], theta, version
            heard = set()
            for i, (_, _, v) in work.items():
                if version - v > tolerance:
                    cache[i] = theta
    return out, seen


@pytest.mark.parametrize(("quota", "tolerance"), [(2, 5), (2, 1), (3, 1), (1, 2), (1, 1)])
def test_safa_against_an_independent_loop(quota: int, tolerance: int) -> None:
    w = run({"name": "safa", "quota": quota / N, "max_staleness": tolerance}, turns=30)
    want, seen = safa([d / K * K for d in SLOW], 30, quota, tolerance, Problem())
    assert close(w, want)
    assert "tolerable" in seen
    assert ("deprecated" in seen) == (tolerance < 5)


def test_what_safa_hears_beyond_the_quota_enters_the_caches_afterwards() -> None:
    s = bare({"name": "safa", "quota": 0.5}, clients=4)
    jobs = ask(s)
    order = sorted(jobs.values(), key=lambda j: j.id)
    for j, x in zip(order, (4.0, 8.0, 100.0, 200.0), strict=True):
        tell(s, j, x)
    assert s.step() is not None
    assert now(s) == (4 + 8) / 4
    assert s.step() is None
    again = sorted(ask(s).values(), key=lambda j: j.id)
    assert len(again) == 4
    assert {j.version for j in again} == {1}
    by_client = {j.client: j for j in again}
    tell(s, by_client[order[0].client], 1.0)
    assert advance(s, by_client[order[1].client], 1.0) is not None
    assert now(s) == (3 + 1 + 3 + 1 + 100 + 200) / 4


# --- where it all leads -------------------------------------------------------------------------------------------------
ALL = [
    *KINDS,
    {"name": "ca2fl", "news": "clients"},
    {"name": "fedasync", "fading": "hinge"},
    {"name": "fedbuff", "concurrency": 2, "selection": "fair"},
    {"name": "fedfa", "total_weight": "1"},
]


@pytest.mark.parametrize("sched", ALL, ids=lambda s: "-".join(map(str, s.values())))
def test_identical_clients_reach_the_centralized_optimum(sched: dict[str, Any]) -> None:
    lr, steps, turns, more = 0.2, 20, 250, {}
    if sched["name"] == "fadas":
        turns, more = 1000, {"lr": 0.2, "beta1": 0.5, "buffer": 2}
    elif sched.get("total_weight") == "1":  # five clients' whole differences at a time: local work must be small
        lr, steps, turns = 0.05, 1, 1100
    elif sched == {"name": "fedfa"}:
        steps, turns = 2, 500
    d = devices(SLOW, steps)
    w = quadratic(clients=N, meth="fedavg", turns=turns, sched=sched | more, devices=d, lr=lr, steps=steps)
    problem = Problem(N, lr, steps)
    problem.H, problem.c = problem.H[:1].expand(N, -1, -1), problem.c[:1].expand(N, -1)
    quick(w, problem).simulation.run()
    assert torch.allclose(flat(w.final), problem.c[0], atol=1e-10)


def test_who_is_biased_towards_fast_clients() -> None:
    """The late average's distance from where synchronous FedAvg stands still: eight heterogeneous clients, speeds a
    factor of ten apart. CA2FL's is none; the others' is not."""
    durations = [1.0 + 8.7 * i / 7 for i in range(8)]
    problem = Problem(8, lr=0.1, steps=4)
    goal = problem.fixed()
    for c in range(8):  # the trainer's local steps are those of the formula
        assert torch.allclose(problem.local(c, goal), -problem.map[c] @ (goal - problem.c[c]), atol=1e-12)

    def distance(sched: Any, turns: int) -> float:
        w = run(sched, durations, turns, clients=8, steps=4)
        late = w.iterates[turns // 2 :]
        return float((sum(map(flat, late)) / len(late) - goal).norm())

    table = {
        "sync": distance("sync", 120),
        "ca2fl": distance({"name": "ca2fl", "buffer": 4}, 300),
        "fedbuff": distance({"name": "fedbuff", "buffer": 4}, 150),
        "fedasync": distance("fedasync", 500),
        "fedfa models": distance({"name": "fedfa", "window": 4, "form": "model"}, 500),
        "fedfa differences": distance({"name": "fedfa", "window": 4, "form": "delta"}, 500),
    }
    assert table["sync"] < 1e-3, table
    assert table["ca2fl"] < 1e-3, table
    for name in set(table) - {"sync", "ca2fl"}:
        assert table[name] > 0.1 > 100 * table["ca2fl"], table
