"""FedKRSO: coordinates in random subspaces stand for whole weights, exactly; what they cost, and where they break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import World, assemble, collate, language, tokens

from hocket import needs, run
from hocket import plan as plans
from hocket.combine import mean
from hocket.errors import RecipeError
from hocket.evaluate import heldout
from hocket.experiment import Experiment
from hocket.export import export
from hocket.methods import Local, Update, fedkrso, method
from hocket.methods.fedavg import FedAvg
from hocket.methods.fedkrso import PART, SEED
from hocket.methods.lora import BASE, PREFIX, A, B, modules
from hocket.models import load, memory
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.recipe import parse
from hocket.report import read
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, generator, nbytes

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "mlp.c_proj"]}


def spec(arch: str = "llama", **more: Any) -> dict[str, Any]:
    return {"name": "fedkrso", "rank": 2, "subspaces": 3, "interval": 2, "targets": TARGETS[arch], **more}


def exact(
    arch: str, meth: Any, turns: int = 1, sched: Any = "sync", dtype: Any = torch.float64, **training: Any
) -> World:
    """Three clients in float64; 5 steps are three intervals of 2."""
    torch.set_num_threads(1)
    model, _ = tiny(arch, vocab=64, layers=2, width=16)
    m = method.build(meth)
    view = make(model.to(dtype), m, "causal", 7)
    config = Training.model_validate({"lr": 1e-2, "local_steps": 5, "batch_size": 2, "optimizer": "sgd", **training})
    rows = [3, 4, 5]
    trainer = TorchTrainer(view, [tokens(i, n) for i, n in enumerate(rows)], collate, config)
    return assemble(view, trainer, rows, m, sched, turns, "raw", "raw", weighting="rows")


def ends(w: World) -> dict[tuple[int, int], Tree]:
    """Of every (client, turn) to come, the weights that the client itself has at its job's end."""
    steps, view, seen = w.trainer._steps, w.trainer.view, {}

    def noting(local: Local, *more: Any) -> None:
        steps(local, *more)
        here = {k: view.logical(k).detach() for k in view.params}
        biases = {k: x.clone() for k, x in here.items() if k.endswith("bias")}
        seen[local.client, local.turn] = biases | {m + BASE: here[m + BASE] + here[m + B] @ here[m + A] for m in modules(here)}

    w.trainer._steps = noting
    return seen


@pytest.mark.parametrize(("arch", "biases"), [("llama", False), ("gpt2", False), ("gpt2", True)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("cohort", [None, 2])
def test_sums_of_coordinates_are_fedavg_of_the_clients_weights(
    arch: str, biases: bool, optimizer: str, cohort: int | None
) -> None:
    sched = {"name": "sync", "cohort": cohort} if cohort else "sync"
    w = exact(arch, spec(arch, biases=biases), 3, sched, optimizer=optimizer, lr=0.5 if optimizer == "sgd" else 1e-2)
    seen = ends(w)
    w.run()
    assert len(seen) == 3 * (cohort or 3)
    for turn in range(3):
        who = [c for c, t in seen if t == turn]
        total = sum(3 + c for c in who)
        moving = [k for k in w.final if k.endswith((BASE, BASE.replace("weight", "bias")))]
        assert biases == any(k.endswith("bias") for k in moving)
        for k in moving:
            want = sum(seen[c, turn][k] * (3 + c) / total for c in who)
            after = w.iterates[turn + 1][k]
            assert float((after - want).abs().max()) < 1e-14
            assert float((after - w.iterates[turn][k]).abs().max()) > 1e-4


def test_who_did_not_use_a_subspace_counts_in_its_mean() -> None:
    """The identity is of means over all clients. A mean over those that have coordinates is not it."""
    w = exact("llama", spec(subspaces=50), lr=0.5)
    seen, server = ends(w), w.simulation.server
    start, receive, sent = dict(server.state["params"]), server.receive, []
    server.receive = lambda u: (sent.append(u), receive(u))[1]  # type: ignore[method-assign]
    w.run()
    for k in (k for k in w.final if k.endswith(BASE)):
        right = sum(seen[c, 0][k] * (3 + c) / 12 for c in range(3))
        assert float((w.final[k] - right).abs().max()) < 1e-14
        among = server.method.effect(dict(mean([u.payload for u in sent], [u.weight for u in sent])))
        assert float((start[k] + among[k] - right).abs().max()) > 1e-4


def subspaces(n: int, r: int, count: int, seed: int = 1) -> torch.Tensor:
    like = torch.zeros(1, r, dtype=torch.float64)
    return torch.stack([fedkrso.random_subspace(seed, k, "m", r, n, like) for k in range(count)])


def test_projections_are_unbiased_and_inflated_as_the_sheet_says() -> None:
    n, r, m = 100, 4, 6
    p = subspaces(n, r, 4000)
    gram = p.mT @ p
    error = gram.mean(0) - torch.eye(n, dtype=torch.float64)
    assert float(error.abs().max()) < 5 * (2 / r / 4000) ** 0.5  # variance of an entry: 1/r, on the diagonal 2/r
    g = torch.randn(m, n, dtype=torch.float64, generator=generator("gradient"))
    sizes = (g @ gram).square().sum((1, 2)) / g.square().sum()
    assert float(sizes.mean()) == pytest.approx((n + r + 1) / r, rel=0.02)  # 26.25


def test_rescaling_is_the_rate_that_descends_most() -> None:
    """f = |W - W*|^2 / 2 is 1-smooth. The expected loss after one step from eta G P^T P is least at r / (n + r + 1)."""
    n, r = 60, 4
    gram = (p := subspaces(n, r, 4000)).mT @ p
    g = torch.randn(1, n, dtype=torch.float64, generator=generator("gap"))
    after = lambda eta: float((g - eta * g @ gram).square().sum((1, 2)).mean() / g.square().sum())
    best = r / (n + r + 1)
    assert after(best) == pytest.approx(1 - best, rel=0.01)
    assert after(best) < min(after(0.5 * best), after(2 * best)) < 1 < after(2.2 * best)
    assert after(1.0) > 10  # the dense rate, as it is


def test_a_step_of_adamw_has_the_dense_length() -> None:
    """All entries of B move by eta, and so E|dB P|^2 = eta^2 m n, whatever r and n."""
    eta, m = 1e-3, 8
    for n, r in ((40, 1), (40, 4), (160, 4)):
        signs = torch.randn(m, r, dtype=torch.float64, generator=generator("signs", r)).sign()
        size = (eta * signs @ subspaces(n, r, 3000)).square().sum((1, 2)).mean()
        assert float(size) == pytest.approx(eta**2 * m * n, rel=0.03)


def one_job(w: World, client: int = 0, start: Tree | None = None) -> tuple[Local, Tree, Tree]:
    """(client, start, upload) of a job by hand."""
    server = w.simulation.server
    start = dict(server.state["params"]) if start is None else start
    local = Local(client, start, {}, 0, 1, 0, 7, w.trainer)
    return local, start, server.method.train(local, start)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "momentum"])
def test_a_client_does_the_papers_loop(arch: str, optimizer: str) -> None:
    """Against the loop as it is published, on the dense gradient, with moments that begin anew in every interval."""
    how = {"sgd": {}, "adamw": {"optimizer": "adamw"}, "momentum": {"momentum": 0.9}}[optimizer]
    w = exact(arch, spec(arch, rescale=False), clip=None, **how)
    local, start, sent = one_job(w)
    view, m = w.trainer.view, w.simulation.server.method
    seed = f"{int(start[SEED]):016x}"
    order = torch.randint(3, (3,), generator=generator(7, SEED, 0, 0)).tolist()
    weights = {k: start[k + BASE].clone() for k in modules(start)}
    sums = {k: {i: torch.zeros_like(start[k + B]) for i in order} for k in weights}
    view.place({k: v for k, v in start.items() if k != SEED})
    for step, (batch,) in enumerate(w.trainer._batches(local)):
        i = order[step // 2]
        ps = {k: fedkrso.random_subspace(int(seed, 16), i, k, 2, x.shape[1], x) for k, x in weights.items()}
        if step % 2 == 0:
            coordinates = {k: torch.nn.Parameter(torch.zeros_like(start[k + B])) for k in weights}
            make = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
            more = (
                {"weight_decay": 0.0} if optimizer == "adamw" else {"momentum": 0.9 if optimizer == "momentum" else 0.0}
            )
            opt = make(coordinates.values(), 1e-2, **more)
        view.place({k + BASE: x for k, x in weights.items()})
        params = [view.params[k + BASE].requires_grad_(True) for k in weights]
        total, count = w.trainer._loss(view.model, batch)
        dense = torch.autograd.grad(total / count, params)
        for (k, b), g in zip(coordinates.items(), dense, strict=True):
            before = b.detach().clone()
            b.grad = view.turned(k + BASE, g) @ ps[k].T  # G_B
            coordinates[k].before = before
        opt.step()
        for k, b in coordinates.items():
            moved = b.detach() - b.before
            weights[k] = weights[k] + moved @ ps[k]
            sums[k][i] += moved
        for p in params:
            p.requires_grad_(False)
    assert set(sent) == {f"{k}.lora_B.{seed}.{i}.{weights[k].shape[1]}" for k in weights for i in order}
    for k in weights:
        for i in order:
            got = sent[f"{k}.lora_B.{seed}.{i}.{weights[k].shape[1]}"]
            assert torch.allclose(got, sums[k][i], rtol=1e-9, atol=1e-13)
        assert torch.allclose(start[k + BASE] + m.effect(sent)[k + BASE], weights[k], atol=1e-12)
        assert float(got.abs().max()) > 1e-6


def test_with_orthonormal_square_p_it_is_plain_fedavg(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotation(seed: int, k: int, module: str, rank: int, width: int, like: torch.Tensor) -> torch.Tensor:
        g = torch.randn(width, width, dtype=torch.float64, generator=generator(seed, k, module))
        return torch.linalg.qr(g).Q

    monkeypatch.setattr(fedkrso, "random_subspace", rotation)
    w = exact("llama", spec(rank=16, rescale=False, targets=["q_proj", "v_proj"]), 3, lr=0.5).run()
    names = {k.removeprefix(PREFIX).replace(BASE, ".weight"): k for k in w.final if k.endswith(BASE)}
    monkeypatch.setattr(FedAvg, "trains", lambda self, local: names.__contains__)
    plain = exact("llama", "fedavg", 3, lr=0.5).run()
    for k, ours in names.items():
        assert torch.allclose(w.final[ours], plain.final[k], atol=1e-12)
        assert not torch.allclose(w.final[ours], w.iterates[0][ours], atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_one_subspace_and_interval_is_ffa_lora_merged(arch: str) -> None:
    w = exact(arch, spec(arch, subspaces=1, interval=9), optimizer="adamw", weight_decay=0.1)
    start = dict(w.simulation.server.state["params"])
    w.run()
    other = exact(
        arch,
        {"name": "ffa-lora", "rank": 2, "alpha": 2.0, "targets": TARGETS[arch]},
        optimizer="adamw",
        weight_decay=0.1,
    )
    params = other.simulation.server.state["params"]
    for m in modules(params):
        params[m + A] = fedkrso.random_subspace(int(start[SEED]), 0, m, 2, params[m + A].shape[1], params[m + A])
    other.run()
    for m in modules(params):
        merged = start[m + BASE] + other.final[m + B] @ other.final[m + A]
        assert torch.allclose(w.final[m + BASE], merged, atol=1e-14)


def test_rescaling_scales_sgds_rate_and_nothing_of_adamw() -> None:
    """All n are 16 here: the rate of every B times r / (n + r + 1)."""
    q = {"targets": ["q_proj", "up_proj"]}
    _, _, ours = one_job(exact("llama", spec(**q), lr=0.5, clip=None))
    _, _, by_hand = one_job(exact("llama", spec(**q, rescale=False), lr=0.5 * 2 / 19, clip=None))
    assert all(torch.allclose(ours[k], by_hand[k], atol=1e-15) and bool(ours[k].any()) for k in by_hand)
    _, _, a = one_job(exact("llama", spec(**q), optimizer="adamw"))
    _, _, b = one_job(exact("llama", spec(**q, rescale=False), optimizer="adamw"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_ever_has_a_gradient_and_all_come_back(dtype: torch.dtype) -> None:
    w = exact("llama", spec(), dtype=dtype, optimizer="adamw")
    trainer, view = w.trainer, w.trainer.view
    before = {k: v.clone() for k, v in w.simulation.server.state["params"].items()}
    backward, seen = trainer._backward, []

    def watching(*args: Any) -> float:
        value = backward(*args)
        with_gradient = {k for k, p in view.params.items() if p.grad is not None}
        seen.append((with_gradient, {k: p.untyped_storage().data_ptr() for k, p in view.params.items()}))
        return value

    trainer._backward = watching
    _, start, sent = one_job(w, start=trainer.start() | {SEED: before[SEED]})
    assert len(seen) == 5
    assert all(names == {k for k in view.params if k.endswith(B)} for names, _ in seen)
    assert len({tuple(at.values()) for _, at in seen}) == 1  # written into where it is
    assert all(torch.equal(start[k].to(v), v) for k, v in before.items())  # not into the server's own
    assert all(v.dtype == torch.float32 and bool(v.any()) for v in sent.values())
    assert all(torch.equal(view.logical(k).to(v), v) for k, v in start.items() if k.endswith((BASE, B)))


def test_moments_begin_anew_with_every_interval_but_the_heads() -> None:
    w = exact("llama", spec(), optimizer="adamw")
    build, made = w.trainer._optimizer, []
    w.trainer._optimizer = lambda *args: made.append(build(*args)) or made[-1]
    one_job(w)
    assert {int(s["step"]) for s in made[0].state.values()} == {1}  # the fifth step is its interval's first
    model, _ = tiny("bert", "classification", vocab=64, layers=2, width=16, num_labels=3)
    m = method.build({"name": "fedkrso", "rank": 2, "interval": 2})
    view = make(model, m, "classification", 0)
    rows = [[{"ids": t, "label": (i + c) % 3} for i, t in enumerate(tokens(c, 4))] for c in range(2)]

    def batch(chosen: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.stack([r["ids"] for r in chosen])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([r["label"] for r in chosen]),
        }

    trainer = TorchTrainer(view, rows, batch, Training.model_validate({"lr": 1e-2, "local_steps": 5, "batch_size": 2}))
    w = assemble(view, trainer, [4, 4], m, "sync", 2, "raw", "raw")
    build = trainer._optimizer
    trainer._optimizer = lambda *args: made.append(build(*args)) or made[-1]  # type: ignore[method-assign]
    w.run()
    assert {int(s["step"]) for s in made[-1].state.values()} == {1, 5}
    head = [k for k in w.final if "classifier" in k]
    assert head
    for k in head:  # averaged beside
        assert torch.allclose(
            w.iterates[1][k] - w.iterates[0][k], sum(w.deltas[c, 0][k] for c in (0, 1)) / 2, atol=1e-7
        )
    assert m.beside([*w.simulation.server.state["params"], "1/q.lora_B.00000000000000aa.0.16", *head]) == head * 2


def small(**more: Any) -> tuple[Any, Any]:
    """A method and its state at version 0, of one module of 7 x 5."""
    m: Any = method.build({"name": "fedkrso", "rank": 2, "subspaces": 3, **more})
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator("small", *shape))
    params = {"q" + A: draw(2, 5), "q" + B: torch.zeros(7, 2).double(), "q" + BASE: draw(7, 5), "head": draw(3)}
    return m, m.init(params, 11)


def coordinates(state: Any, *ks: int, key: Any = 0) -> Tree:
    seed = int(state["params"][SEED])
    return {
        f"q.lora_B.{seed:016x}.{k}.5": torch.randn(7, 2, dtype=torch.float64, generator=generator("c", key, k))
        for k in ks
    }


def update(payload: Tree, job: int = 0, version: int = 0) -> Update:
    return Update(job, job, version, version, payload)


def test_a_stale_upload_is_read_in_the_subspaces_it_was_made_in() -> None:
    m, state = small()
    late, first = coordinates(state, 0, 2, key="late"), coordinates(state, 0, 1)
    second = m.step(state, [update(first)], [1.0])
    fresh = coordinates(second, 0)
    assert not set(late) & set(fresh)
    assert m.check(second, update(late, version=0)) is None
    assert "does not have" in m.check(second, update(late, version=1))
    after = m.step(second, [update(late), update(fresh, 1, 1)], [1.0, 3.0])
    want = second["params"]["q" + BASE] + m.effect(late)["q" + BASE] / 4 + m.effect(fresh)["q" + BASE] * 3 / 4
    assert torch.allclose(after["params"]["q" + BASE], want, atol=1e-14)
    world = m.own(second["params"], {k: v / 4 for k, v in late.items()} | {"head": torch.ones(3).double()})
    assert torch.allclose(world["q" + BASE], second["params"]["q" + BASE] + m.effect(late)["q" + BASE] / 4, atol=1e-14)
    assert torch.equal(world["head"], second["params"]["head"] + 1)


def test_dense_differences_count_like_their_coordinates() -> None:
    m, state = small()
    a, b = coordinates(state, 0, 1, key="a"), coordinates(state, 1, 2, key="b")
    told = m.step(state, [update(a), update(b, 1)], [1.0, 2.0])
    untold = m.step(state, [update(dict(m.effect(a))), update(b, 1)], [1.0, 2.0])
    assert torch.allclose(told["params"]["q" + BASE], untold["params"]["q" + BASE], atol=1e-14)
    assert int(told["params"][SEED]) == int(untold["params"][SEED]) != int(state["params"][SEED])
    assert told["last"]
    assert not untold["last"]
    adam, _ = small(server_optimizer="adam", server_lr=0.1)
    stepped = adam.step(state, [update(a)], [1.0])
    assert bool((stepped["params"]["q" + BASE] - state["params"]["q" + BASE]).abs().max() > 0.01)


def test_a_discounted_update_shortens_the_step_and_rates_multiply() -> None:
    m, state = small(server_lr=0.5)
    a = coordinates(state, 0, 1)
    after = m.step(state, [update(a)], [0.5], [2.0])
    want = state["params"]["q" + BASE] + 0.5 * 0.25 * m.effect(a)["q" + BASE]
    assert torch.allclose(after["params"]["q" + BASE], want, atol=1e-14)
    with pytest.raises(ValueError, match="sum to 0"):
        m.step(state, [update(a)], [0.0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({".lora_B.{seed}.3.5": (7, 2)}, "does not exist"),  # there are 3 subspaces
        ({".lora_B.{seed}.0.6": (7, 2)}, "does not exist"),  # not as wide as the weight
        ({".lora_B.{seed}.00.5": (7, 2)}, "does not exist"),  # a second name for the same
        ({".lora_B.00000000000000aa.0.5": (7, 2)}, "version 0 does not have"),
        ({".lora_B.{seed}.0.5": (7, 3)}, "shape"),
        ({".lora_B.{seed}.0.5": None}, "not finite"),
        ({"x.lora_B.{seed}.0.5": (7, 2)}, "unknown"),
        ({BASE: (7, 5)}, "not a client's"),
        ({A: (2, 5)}, "not a client's"),
        ({B: (7, 2)}, "not a client's"),
    ],
)
def test_uploads_that_do_not_fit_are_refused(change: dict[str, Any], reason: str) -> None:
    m, state = small()
    seed = f"{int(state['params'][SEED]):016x}"
    bad = {
        "q" + k.format(seed=seed): torch.zeros(*shape).double() if shape else torch.full((7, 2), float("nan")).double()
        for k, shape in change.items()
    }
    assert m.check(state, update(coordinates(state, 1))) is None
    assert reason in str(m.check(state, update(coordinates(state, 1) | bad)))
    assert "not a client's" in str(m.check(state, update({SEED: state["params"][SEED]})))
    assert "head" in str(m.check(state, update({"head": torch.zeros(4).double()})))


def test_subspaces_depend_on_their_keys_alone() -> None:
    like = torch.zeros(1, 2, dtype=torch.float64)
    draw = lambda *keys: fedkrso.random_subspace(*keys, 2, 5, like)
    one = draw(3, 1, "q")
    assert all(not torch.equal(one, draw(*keys)) for keys in ((4, 1, "q"), (3, 2, "q"), (3, 1, "v")))
    assert torch.equal(one, draw(3, 1, "q"))  # whatever was drawn in between
    half = fedkrso.random_subspace(3, 1, "q", 2, 5, like.bfloat16())
    assert torch.equal(half, one.bfloat16())


@pytest.mark.parametrize("sched", [{"name": "sync", "cohort": 2}, {"name": "overlap", "staleness": 2}], ids=str)
@pytest.mark.parametrize("down", ["raw", "half"])
def test_simulated_clients_hold_what_loading_gives(sched: Any, down: str) -> None:
    """Catching up through every missed version's coordinates gives the server's bits, or those of its mirror."""
    w = language(meth=spec(rank=1, subspaces=2), sched=sched, turns=7, steps=4, layers=2, down=down, width=16)
    server, downlink = w.simulation.server, w.simulation.downlink
    held = {c: dict(server.state["params"]) for c in server.clients}
    send, versions = downlink.send, []

    def checking(job: Any, s: Any) -> Any:
        download = send(job, s)
        packet = downlink.codec.decode(downlink.codec.encode(job.payload))
        held[job.client] = s.method.load(held[job.client], packet)
        # a missed version's dense weights, where they are less, are rounded otherwise than step by step
        exactly = down == "raw" or all("/" in k or not k.endswith(BASE) for k in job.payload)
        assert not exactly or all(torch.equal(held[job.client][k], download.view[k]) for k in download.view)
        versions.append({int(k.partition("/")[0]) for k in job.payload if "/" in k})
        return download

    downlink.send = checking  # type: ignore[method-assign]
    w.run()
    assert len(versions) >= 12
    assert down != "raw" or max(map(len, versions)) > 1 or sched["name"] == "overlap"  # somebody caught up


def test_bytes_are_the_coordinates_that_were_used() -> None:
    w = language(meth=spec(rank=1), turns=3, clients=2, width=64, steps=6, layers=2)
    server, send, receive = w.simulation.server, w.simulation._send, w.simulation.server.receive
    up: list[tuple[int, int, Tree]] = []
    down: list[Tree] = []
    w.simulation._send = lambda job: (down.append(job.payload), send(job))[1]  # type: ignore[method-assign]
    server.receive = lambda u: (up.append((u.client, u.turn, dict(u.payload))), receive(u))[1]  # type: ignore[method-assign]
    w.run()
    rows = sum(len(v) for k, v in w.final.items() if k.endswith(B))  # sum of m
    assert len(up) == 6
    for client, turn, sent in up:
        used = set(torch.randint(3, (3,), generator=generator(7, SEED, client, turn)).tolist())
        assert nbytes(sent) == 4 * len(used) * rows * 1
    for payload in down[2:]:
        ks = {PART.fullmatch(k.partition("/")[2])[3] for k in payload if "/" in k}
        assert nbytes(payload) == 4 * len(ks) * rows + 8


def data(tmp_path: Path, **more: Any) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("\n".join(f"client text number {i} of sixty" for i in range(60)))
    return {
        "turns": 2, "model": {"source": "tiny:gpt2"}, "method": {"name": "fedkrso", "rank": 1, "subspaces": 2, "interval": 2},
        "data": {"source": str(tmp_path / "a.txt"), "max_length": 64}, "clients": {"count": 2},
        "training": {"lr": 1e-2, "local_steps": 5}, **more,
    }  # fmt: skip


def test_a_run_is_planned_to_the_byte_and_ends_as_a_plain_model(tmp_path: Path) -> None:
    recipe = parse(data(tmp_path))
    planned = plans.clock(recipe)
    run.start(recipe, tmp_path / "run")
    table = read(tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out") == "model"
    opened = load(str(tmp_path / "out")).model
    assert not any("lora" in k for k, _ in opened.named_parameters())
    e, last = Experiment(recipe), table.evals[-1]
    assert heldout(opened, e.data.heldout, e.collate)["loss"] == pytest.approx(last["loss"], rel=1e-5)
    lines = [json.loads(x) for x in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    for way in ("down", "up"):
        assert sum(r["bytes"] for r in lines if r["what"] == way) == planned[way] > 0


def test_what_would_carry_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"optimizer_state.*'reset'"):
        parse(data(tmp_path, training={"optimizer_state": "keep"}))
    with pytest.raises(RecipeError, match=r"codec\.up"):
        parse(data(tmp_path, codec={"up": {"name": "feedback", "codec": "int8"}}))
    with pytest.raises(RecipeError, match=r"mu: B begins at zero"):
        parse(data(tmp_path, method={"name": "fedkrso", "mu": 0.1}))
    for more in ({"dropout": 0.1}, {"scaling": "constant"}):
        with pytest.raises(RecipeError, match=rf"{next(iter(more))}: W moves by B P itself"):
            parse(data(tmp_path, method={"name": "fedkrso", **more}))


def test_biases_where_there_are_none_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"method\.biases: the modules adapted in LlamaForCausalLM have none"):
        exact("llama", spec(biases=True))


def test_subspaces_that_save_nothing_are_said_before_a_run(tmp_path: Path) -> None:
    """The adapted weights are all of n inputs; 5 steps in intervals of 2 use at most 3 subspaces."""
    at = lambda rank, steps, **more: parse(data(
        tmp_path, method={"name": "fedkrso", "rank": rank, "subspaces": 50, "interval": 2, **more},
        training={"local_steps": steps},
    ))  # fmt: skip
    n = load("tiny:gpt2").model.config.n_embd
    assert not needs.vain(at(n // 3 - 1, 5))
    (line,) = needs.vain(at(-(-n // 3), 5))
    assert "method.subspaces: 3 of method.rank" in line
    assert "in 4 of 4 weights" in line
    assert not needs.vain(at(1, 2 * (n - 1), subspaces=n))
    assert needs.vain(at(1, 2 * n, subspaces=n))
    heard: list[Any] = []
    recipe = at(n, 1)
    needs.note(recipe, [3, 3], None, heard.append)  # type: ignore[arg-type]
    assert [h["what"] for h in heard] == ["warning"]
    assert not needs.vain(parse(data(tmp_path, method="flora")))


def test_decay_pulls_coordinates_and_never_weights() -> None:
    """Decay shortens what an interval learns; W = W_0 + sum_k B_k P_k stays true on every client."""
    w = exact("llama", spec(), optimizer="adamw", lr=1e-2, weight_decay=50.0)  # half of B a step
    seen = ends(w)
    start = dict(w.simulation.server.state["params"])
    w.run()
    free = exact("llama", spec(), optimizer="adamw", lr=1e-2).run()
    for k in (k for k in start if k.endswith(BASE)):
        assert float((w.final[k] - sum(seen[c, 0][k] * (3 + c) / 12 for c in range(3))).abs().max()) < 1e-14
        moved, freely = (float((x.final[k] - start[k]).norm()) for x in (w, free))
        assert 0 < moved < 0.9 * freely


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_planned_as_measured_and_as_the_sheet_has_it(dtype: torch.dtype) -> None:
    model, _ = tiny("llama", vocab=64, layers=4, width=64)
    m = method.build({"name": "fedkrso", "rank": 4, "interval": 2, "subspaces": 3})
    view = make(model.to(dtype), m, "causal", 3)
    config = Training.model_validate({"batch_size": 2, "local_steps": 6, "measure_memory": True})
    trainer = TorchTrainer(view, [tokens(0, 6, length=24)], collate, config)
    start = m.init(trainer.start(), 1)["params"]
    noted = memory.Noted(trainer)
    local = Local(0, start, {}, 0, 1, 0, 1, noted)
    sent = m.train(local, start)
    step = memory.Step(2, 24, 2, config.precision)
    need = memory.needs(view, noted.jobs, step)[0]
    found = {k.removeprefix("memory_"): v for k, v in local.metrics.items() if k.startswith("memory_")}
    for part in ("parameters", "gradients", "optimizer", "after_start", "after_backward", "after_step"):
        assert need.table[part] == pytest.approx(found[part], rel=0.01), part
    b = 4 * sum(p.numel() for k, p in view.params.items() if k.endswith(B))
    used = nbytes(sent) // b
    assert 1 < used <= 3
    assert need.gradients == b
    assert need.optimizer == 2 * b + 4 * len(modules(start))
    assert need.trained == (1 + used) * b
    assert memory.needs(view, noted.jobs, memory.Step(2, 24, 2, config.precision, gpu=True))[0].trained == 0


@pytest.mark.parametrize("sched", ["sync", "overlap", "fedbuff", "fedasync", "fedfa", "ca2fl"])
def test_it_learns_under_any_clock(sched: str) -> None:
    meth = spec(rank=4)
    w = language(meth=meth, sched=sched, turns=24, steps=4, layers=2, width=16, training={"lr": 5e-3})
    batch = collate([t for c in range(3) for t in tokens(c, 3)])
    measure = lambda: float(w.trainer.loss(w.final, batch))
    before = measure()
    w.simulation.run()
    assert measure() < before - 0.4


def test_half_precision_models_learn() -> None:
    w = exact("llama", spec(rank=4), 12, dtype=torch.bfloat16, optimizer="adamw", lr=5e-3)
    batch = collate([t for c in range(3) for t in tokens(c, 3)])
    start = w.trainer.start()
    before = float(w.trainer.loss(start, batch))
    w.run()
    assert float(w.trainer.loss(w.final, batch)) < before - 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_trains_in_the_same_subspaces(dtype: torch.dtype) -> None:
    sent = []
    for device in ("cpu", "cuda"):
        model, _ = tiny("gpt2", vocab=64, layers=2, width=16)
        m = method.build(spec("gpt2"))
        view = make(model.to(device, dtype), m, "causal", 7)
        config = Training.model_validate({"lr": 1e-3, "local_steps": 5, "batch_size": 2, "measure_memory": True})
        trainer = TorchTrainer(view, [tokens(0, 4)], collate, config)
        start = m.init(trainer.start(), 1)["params"]
        local = Local(0, start, {}, 0, 1, 0, 1, trainer)
        model.config.attn_pdrop = 0.0
        for x in model.modules():
            if isinstance(x, torch.nn.Dropout):
                x.p = 0.0
        sent.append(m.train(local, start))
    assert set(sent[0]) == set(sent[1])
    assert all(v.device.type == "cpu" for v in sent[1].values())
    if dtype == torch.float32:
        assert all(torch.allclose(sent[0][k], sent[1][k], atol=5e-4) for k in sent[0])
