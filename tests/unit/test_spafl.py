"""SpaFL: rows below their threshold are pruned, thresholds alone travel, and weights stay at home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from worlds import World, assemble, collate, language, tokens

from hocket import run
from hocket.errors import RecipeError, StoreError
from hocket.evaluate import heldout
from hocket.experiment import Experiment
from hocket.export import export
from hocket.methods import Local, Method, Update, method
from hocket.methods.base import PLAIN
from hocket.methods.fedsa import OWN
from hocket.methods.spafl import HEARD, OPEN, ROWS, Rows, SpaFL, alive, thresholds, weight
from hocket.models import memory
from hocket.models.forward import predictions
from hocket.models.tiny import tiny
from hocket.models.views import View, make
from hocket.plan import plan
from hocket.recipe import parse
from hocket.report import read
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, generator, nbytes

SGD = {"optimizer": "sgd", "lr": 0.5, "clip": 3.0}


@dataclass(frozen=True, config=PLAIN)
class Frozen(SpaFL):
    """Thresholds stay as they are."""

    name = "frozen"

    def trains(self, local: Local) -> Any:
        return lambda name: not name.endswith(ROWS)


def draw(*shape: int, key: str = "") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("spafl", key, *shape))


def exact(model: Any, batch: Any) -> tuple[Tensor, int]:
    """The summed loss, in float64 to the end."""
    logits, target = predictions(model, batch)
    loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    return loss, target.numel()


def double(m: Method, clients: int = 3, turns: int = 3) -> World:
    """As `worlds.language`, in float64."""
    torch.set_num_threads(1)
    view = make(tiny("gpt2", vocab=64, layers=2, width=8)[0].double(), m)
    config = Training.model_validate({**SGD, "local_steps": 2, "batch_size": 2})
    rows = [3 + c for c in range(clients)]
    trainer = TorchTrainer(view, [tokens(c, n) for c, n in enumerate(rows)], collate, config, loss=exact)
    return assemble(view, trainer, rows, m, "sync", turns, "raw", "raw")


def memories(w: World) -> list[Tree]:
    return [dict(w.simulation._remembered(c)) for c in range(len(w.simulation.devices))]


def own_losses(w: World) -> list[float]:
    """Each client's own model, on its rows."""
    m = w.simulation.server.method
    batches = [collate(tokens(c, 3 + c)) for c in range(3)]
    return [float(w.trainer.loss(m.personalized(w.final, x), b)) for x, b in zip(memories(w), batches, strict=True)]


# --- the mask and its gradients ---------------------------------------------------------------------------------------
class Step(torch.autograd.Function):
    """1[x > 0] with the gradient of 1 where `passes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beyond: bool) -> Tensor:
        ctx.passes = x.abs() > 1 if beyond else x.abs() <= 1
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy * ctx.passes, None


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_a_masked_module_is_the_masked_weight_gradients_included(kind: str, beyond: bool) -> None:
    """y = (w o m) x + b, and what autograd makes of it, in float64; some rows pruned, some far from their threshold."""
    n, rows = 5, 8
    layers = nn.ModuleList([Conv1D(rows, n) if kind == "conv1d" else nn.Linear(n, rows, bias=kind != "no bias")]).double()
    plain = layers[0]
    w = (0.1 * draw(rows, n)).mul_(torch.tensor([1, 1, 1, 1, 1, 1, 40, 40.0]).unsqueeze(1))
    plain.weight.data = w.T.contiguous() if kind == "conv1d" else w.clone()
    if plain.bias is not None:
        plain.bias.data = draw(rows)
    x, direction = draw(3, 4, n).requires_grad_(True), draw(3, 4, rows, key="y")
    tau = torch.tensor([0, 0, 0.3, 0.3, -3.0, 3.0, 0, 0]).double()
    ws, ts = w.clone().requires_grad_(True), tau.clone().requires_grad_(True)
    mask = Step.apply(ws.abs().mean(1) - ts, beyond).unsqueeze(1).expand(rows, n)
    want = functional.linear(x, ws * mask, plain.bias)
    expected = torch.autograd.grad((want * direction).sum(), [x, ws, ts])
    assert expected[2].abs().gt(0).tolist() == ([False] * 4 + [True] * 4 if beyond else [True] * 4 + [False] * 4)

    here = nn.ModuleDict({"layers": layers})
    make(here, method.build({"name": "spafl", "gradient": "published" if beyond else "straight"}))
    masked = here["layers"][0]  # type: ignore[index]
    masked.threshold.data = tau.clone()
    for p in masked.parameters():
        p.requires_grad_(True)
    found = masked(x)
    assert torch.allclose(found, want, atol=1e-14)
    if plain.bias is not None:
        assert torch.equal(found[..., 2], plain.bias[2].expand(3, 4))
    (found * direction).sum().backward()
    got = masked.weight.grad.T if kind == "conv1d" else masked.weight.grad
    for a, b in zip((x.grad, got, masked.threshold.grad), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-13)
    if plain.bias is not None:
        assert torch.allclose(masked.bias.grad, direction.sum((0, 1)))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_low_thresholds_are_the_dense_model_bit_for_bit(arch: str) -> None:
    task = "classification" if arch == "bert" else "causal"
    model, _ = tiny(arch, task, vocab=64, layers=2, width=16)
    ids = torch.stack(tokens(1, 3))
    with torch.no_grad():
        want = model(ids).logits
        view = make(model, method.build("spafl"), task)
        for value in (0.0, OPEN, -1e6):
            view.place({k: torch.full_like(view.params[k], value) for k in thresholds(view.params)})
            assert torch.equal(model(ids).logits, want)
        view.place({k: torch.full_like(view.params[k], 1e6) for k in thresholds(view.params)})
        assert not torch.equal(model(ids).logits, want)
    masked = {weight(k) for k in thresholds(view.params)}
    assert not [k for k in masked if "embed" in k or "lm_head" in k or "classifier" in k or "pooler" in k]
    assert all(view.logical(weight(k)).shape[0] == len(view.params[k]) for k in thresholds(view.params))


def gradients(gradient: str, penalty: bool = False) -> Tree:
    """Of the loss of a tiny model in its thresholds at 0, or of the regularizer."""
    m: Any = method.build({"name": "spafl", "gradient": gradient})
    w = double(m)
    view = w.trainer.view
    taus = {k: view.params[k].requires_grad_(True) for k in thresholds(view.params)}
    loss = m._penalty(taus) if penalty else exact(view.model, collate(tokens(0, 4)))[0]
    return dict(zip(taus, torch.autograd.grad(loss, list(taus.values())), strict=True))


def test_the_published_gradient_brings_nothing_of_the_loss_to_a_threshold() -> None:
    assert all((g == 0).all() for g in gradients("published").values())
    right = gradients("straight")
    assert all((g != 0).any() for g in right.values())
    assert sum(int((g != 0).sum()) for g in right.values()) > 0.9 * sum(g.numel() for g in right.values())
    for kind in ("straight", "published"):
        assert all(torch.allclose(g, torch.full_like(g, -1e-4)) for g in gradients(kind, penalty=True).values())


def test_the_regularizer_is_summed_or_a_mean() -> None:
    taus = {f"a{ROWS}": torch.tensor([0.0, 1.0]), f"b{ROWS}": torch.tensor([2.0]), "a.weight": torch.ones(2, 2)}
    total = sum(torch.tensor([0.0, -1.0, -2.0]).exp())
    found = [SpaFL(alpha=0.5, regularizer=kind)._penalty(taus) for kind in ("sum", "mean")]
    assert torch.allclose(torch.stack(found), torch.stack([0.5 * total, 0.5 * total / 3]))


# --- the paper's identities -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("m", [Frozen(alpha=0.0), SpaFL(alpha=0.0, gradient="published")], ids=["frozen", "published"])
def test_without_regularizer_and_with_still_thresholds_it_is_local_sgd(m: SpaFL) -> None:
    """Thresholds that are frozen, or that no gradient reaches: each client as if it were alone, in float64."""
    w = double(m)
    start = dict(w.final)
    w.simulation.run()
    assert all(torch.equal(w.final[k], start[k]) for k in start)
    plain = double(method.build("fedavg"))  # the same model, without its mask
    for c, found in enumerate(memories(w)):
        mine = dict(plain.final)
        for turn in range(3):
            delta = Local(c, {}, {}, turn, 3, turn, 7, plain.trainer).fit(mine)
            mine = {k: mine[k] + delta[k] for k in mine}
        assert all(torch.allclose(w.trainer.view.turned(k, found[OWN + k]), mine[k], atol=1e-13) for k in mine)
        assert not torch.equal(mine["transformer.wte.weight"], start["transformer.wte.weight"])


def example() -> tuple[SpaFL, Tree]:
    return SpaFL(), {"a.weight": draw(6, 4, key="a"), f"a{ROWS}": torch.zeros(6, dtype=torch.float64), "norm": draw(4)}


def test_equal_thresholds_leave_all_weights_as_they_are() -> None:
    """All clients send the same, and that is no change: d = 0, and not a bit of a weight moves."""
    m, view = example()
    view[f"a{ROWS}"] += 0.25
    state = m.init(view, 0)
    state = m.step(state, [Update(i, i, 0, 0, {f"a{ROWS}": torch.zeros(6).double()}) for i in range(3)], [1.0, 2.0, 4.0])
    mine = {OWN + "a.weight": draw(6, 4, key="mine"), HEARD + f"a{ROWS}": view[f"a{ROWS}"]}
    found = m._heard(state["params"], mine)
    assert torch.equal(found["a.weight"], mine[OWN + "a.weight"])


def test_everybody_s_weights_follow_the_thresholds_by_the_sign_of_their_rows() -> None:
    """One version at a time, by the paper's equation; at once, the same while no row's sum changes its sign. A client
    that never trained moves its start weights."""
    m, view = example()
    tau = [view[f"a{ROWS}"]] + [0.01 * draw(6, key=f"t{v}") for v in range(3)]
    one = lambda w, d: w - d.unsqueeze(1) * w.sum(1, keepdim=True).sign() / 4
    w = view["a.weight"]
    for before, after in zip(tau, tau[1:], strict=False):
        mine = {OWN + "a.weight": w, HEARD + f"a{ROWS}": before}
        now = m._heard(view | {f"a{ROWS}": after}, mine)["a.weight"]
        assert torch.allclose(now, one(w, after - before), atol=1e-15)
        w = now
    assert view["a.weight"].sum(1).abs().min() > 0.05  # no sign can change
    at_once = m._heard(view | {f"a{ROWS}": tau[-1]}, {})["a.weight"]
    assert torch.allclose(at_once, w, atol=1e-14)
    far = [tau[0], 10 * torch.ones(6).double(), torch.zeros(6).double()]  # up and down again
    there = one(one(view["a.weight"], far[1]), far[2] - far[1])
    assert not torch.allclose(there, m._heard(view | {f"a{ROWS}": far[2]}, {})["a.weight"])
    assert torch.equal(m._heard(view, {})["a.weight"], view["a.weight"])


def test_thresholds_are_averaged_over_those_who_took_part() -> None:
    m, view = example()
    k = f"a{ROWS}"
    ends = [draw(6, key=f"end{i}") for i in range(2)]
    after = m.step(m.init(view, 0), [Update(i, i, 0, 0, {k: e - view[k]}) for i, e in enumerate(ends)], [1.0, 3.0])
    assert torch.allclose(after["params"][k], (ends[0] + 3 * ends[1]) / 4)
    assert torch.equal(after["params"]["a.weight"], view["a.weight"])
    assert m.check(m.init(view, 0), Update(0, 0, 0, 0, {k: ends[0]})) is None
    assert "own" in str(m.check(m.init(view, 0), Update(0, 0, 0, 0, {"a.weight": view["a.weight"]})))
    assert "shape" in str(m.check(m.init(view, 0), Update(0, 0, 0, 0, {k: ends[0][:5]})))
    assert "finite" in str(m.check(m.init(view, 0), Update(0, 0, 0, 0, {k: ends[0] * float("nan")})))


# --- sparse layers ----------------------------------------------------------------------------------------------------
def test_a_layer_is_left_with_more_than_one_row_in_a_hundred() -> None:
    w = torch.ones(100, 3).double()
    for rows in (0, 1, 2, 100):
        tau = torch.full((100,), 2.0).double()
        tau[:rows] = 0
        assert bool(alive(w, tau)) == (rows > 1)


def test_a_layer_that_was_pruned_away_starts_again_at_zero() -> None:
    """In the middle of a job, at its end, and where it is only looked at, without a word written into shared values."""
    w = double(SpaFL(alpha=0.0), clients=1)
    view, model = w.trainer.view, w.trainer.view.model
    k = next(iter(thresholds(sorted(w.final))))
    high = w.final | {k: torch.full_like(w.final[k], 5.0)}
    w.trainer.place(high)
    batch = collate(tokens(0, 2))
    model.train()
    w.trainer._loss(model, batch)
    assert (high[k] == 5).all()  # not trained: the value of others
    view.loosen(k)
    w.trainer._loss(model, batch)
    assert (view.params[k] == 0).all()
    assert (high[k] == 5).all()
    m, local = SpaFL(alpha=0.0), Local(0, high, {}, 0, 1, 0, 7, w.trainer)
    sent = m.train(local, high)
    assert (high[k] == 5).all()
    assert sent[k].min() < -4.5  # from 5 to about 0

    class Still:
        def fit(self, local: Any, start: Tree, *_: Any) -> Tree:
            return {k: torch.zeros_like(v) for k, v in start.items()}

    local = Local(0, high, {}, 0, 1, 0, 7, Still())  # type: ignore[arg-type]
    sent = m.train(local, high)
    assert torch.equal(sent[k], -high[k])
    assert (local.memory[OWN + k] == 0).all()
    own = m.personalized(high, local.memory)
    assert (own[weight(k)] != 0).any(1).all()


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_only_thresholds_travel_and_every_client_s_own_model_learns(arch: str) -> None:
    """Bytes are those of packets: 4 a row each way, and names. Each client's loss falls well below the start's."""
    w = language(arch, meth={"name": "spafl", "alpha": 1e-3}, turns=8, training=SGD, layers=2)
    before = own_losses(w)
    start, packets = dict(w.final), {"up": [], "down": []}  # type: ignore[var-annotated]
    put, send = w.simulation.spool.put, w.simulation.downlink.send
    w.simulation.spool.put = lambda key, blob: (packets["up"].append(blob) if key.startswith("up/") else None, put(key, blob))[1]  # type: ignore[method-assign]
    w.simulation.downlink.send = lambda job, server: (packets["down"].append(job.payload), send(job, server))[1]  # type: ignore[method-assign]
    w.simulation.run()
    taus = {k: v for k, v in start.items() if k.endswith(ROWS)}
    rows = 4 * sum(len(v) for v in taus.values())
    assert nbytes(taus) == rows
    assert len(packets["up"]) == 24
    for blob in packets["up"]:
        sent = w.simulation.up.decode(blob)
        assert set(sent) == set(taus)
        assert nbytes(dict(sent)) == rows
        assert len(blob) <= rows + 200 + 200 * len(taus)
    assert w.simulation.ledger.bytes["up"] == sum(map(len, packets["up"]))
    for payload in packets["down"]:
        assert set(payload) in ({*taus}, set())
    assert nbytes(packets["down"][-1]) == rows
    assert all(torch.equal(w.final[k], start[k]) for k in start.keys() - taus.keys())  # no global model
    assert all(not torch.equal(w.final[k], start[k]) for k in taus)
    after = own_losses(w)
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True))
    assert len({float(m[OWN + next(iter(taus))].sum()) for m in memories(w)}) == 3


@pytest.mark.parametrize("sched", ["overlap", "fedbuff", "fedasync"])
def test_weights_are_moved_by_all_that_a_client_heard_and_by_nothing_twice(sched: str) -> None:
    """The sum of what a client's weights were moved by is what it heard last, with losses and stale versions."""
    w = language(meth={"name": "spafl", "alpha": 1e-2}, sched=sched, turns=6, loss=0.3, training=SGD, layers=2)
    heard: dict[int, Tree] = {}
    move = SpaFL._heard

    def noting(self: SpaFL, view: Tree, memory: Any) -> Tree:
        found = move(self, view, memory)
        for k in thresholds(view):
            d = view[k] - memory.get(HEARD + k, torch.zeros_like(view[k]))
            was = memory.get(OWN + weight(k), view[weight(k)])
            moved = (was - found[weight(k)]) * was.sum(1, keepdim=True).sign() * was.shape[1]
            assert torch.allclose(moved, d.unsqueeze(1).expand_as(moved), atol=1e-5)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpaFL, "_heard", noting)
        w.run()
    for (client, _), start in w.starts.items():  # the last job's, as they come in order
        heard[client] = {k: start[k] for k in thresholds(start)}
    for c, mine in enumerate(memories(w)):
        assert all(torch.equal(mine[HEARD + k], v) for k, v in heard.get(c, {}).items())
        assert all(torch.isfinite(v).all() for v in mine.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_memory_is_planned_as_it_is_and_checkpointing_changes_nothing(arch: str, dtype: torch.dtype) -> None:
    deltas = []
    for checkpointing in (False, True):
        model, _ = tiny(arch, vocab=64, layers=4, width=64)
        m = SpaFL(alpha=1e-3)
        view = make(model.to(dtype), m)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = Training.model_validate({"batch_size": 2, "local_steps": 2, "measure_memory": not checkpointing})
        trainer = TorchTrainer(view, [tokens(0, 6, length=24)], collate, config)
        start = trainer.start()
        assert {v.dtype for v in start.values()} == {torch.float32}
        noted, mine = memory.Noted(trainer), {}  # type: ignore[var-annotated]
        for turn in range(2):  # the second job has weights of its own
            local = Local(0, start, mine, turn, 2, turn, 1, noted)
            deltas.append(m.train(local, start))
        if checkpointing:
            break
        planned = memory.needs(view, {0: noted.jobs[0][-1:]}, memory.Step(2, 24, config.slots, config.precision))[0]
        found = {k.removeprefix("memory_"): v for k, v in local.metrics.items() if k.startswith("memory_")}
        for part in ("parameters", "gradients", "optimizer", "after_backward", "after_step"):
            assert planned.table[part] == pytest.approx(found[part], rel=0.02), part
        assert planned.activations == pytest.approx(found["activations"], rel=0.15)
    for plain, again in zip(deltas[:2], deltas[2:], strict=True):
        assert all(torch.allclose(plain[k], again[k], atol=1e-6) for k in plain)
    assert all((d != 0).any() for d in deltas[0].values())


def recipe(tmp_path: Path, **more: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    words = ("good film", "bad film", "fine song", "dull song")
    lines = [{"text": f"{words[i % 4]} number {i}", "label": int(i % 4 in (0, 2))} for i in range(80)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return parse({
        "turns": 3, "model": {"source": "tiny:bert", "task": "classification"}, "method": {"name": "spafl", "alpha": 0.1},
        "data": {"source": str(path), "client_heldout": 5, "max_length": 32}, "clients": {"count": 3},
        "training": {"optimizer": "sgd", "local_steps": 3, "lr": 0.2, "clip": 100.0}, "schedule": {"name": "sync", "cohort": 2}, **more,
    })  # fmt: skip


def test_a_client_s_exported_model_is_plain_sparse_and_as_it_was_scored(tmp_path: Path) -> None:
    """A folder that transformers opens without hocket, and whose pruned rows are zeros."""
    r = recipe(tmp_path)
    out = run.start(r, tmp_path / "run")
    last = read(out).evals[-1]
    assert last["personal"] is True
    assert (last["personal_loss"], last["n"]) == (last["loss"], 15)
    with pytest.raises(StoreError, match="name one, --client 0 to 2"):
        export(out, tmp_path / "no")
    e = Experiment(r)
    masked, pruned = {weight(k) for k in thresholds(e.view.params)}, []
    for c in range(3):
        assert export(out, tmp_path / f"model{c}", client=c) == "model"
        opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"model{c}")
        assert not [k for k in opened.state_dict() if k.endswith(ROWS)]
        assert heldout(opened, e.data.own[c], e.collate)["loss"] == pytest.approx(last["clients"][c], rel=1e-5)
        weights = {k: p for k, p in opened.named_parameters() if k in masked}
        assert len(weights) == len(masked)
        pruned.append(sum(int((p == 0).all(1).sum()) for p in weights.values()))
        assert 0 < pruned[-1] < sum(len(p) for p in weights.values())
    assert len(set(pruned)) > 1


def test_a_plan_has_its_bytes_for_both_layouts_of_a_weight() -> None:
    for source in ("tiny:gpt2", "tiny:llama"):
        base = {"model": {"source": source}, "data": {"source": "docstrings", "client_heldout": 1}, "turns": 2}
        p = plan(parse(base | {"method": "spafl", "clients": {"count": 2}}))
        rows = sum(len(v) for k, v in view_of(source).params.items() if k.endswith(ROWS))
        assert 4 * rows <= p["up"] / 4 <= 4 * rows + 200 + 200 * len(view_of(source).params)


def view_of(source: str) -> View:
    return make(tiny(source.removeprefix("tiny:"))[0], method.build("spafl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"source": "docstrings"}}, r"data\.client_heldout: 'spafl'.*say how many"),
        ({"evaluation": {"gsm8k": "x"}}, r"evaluation\.gsm8k: 'spafl'"),
        ({"method": {"name": "spafl", "gradient": "right"}}, r"method\.gradient"),
        ({"method": {"name": "spafl", "alpha": -1}}, r"method\.alpha"),
        ({"model": {"source": "tiny:llama", "adapter": "x"}}, r"model\.adapter: 'spafl' has no LoRA factors"),
        ({"method": {"name": "spafl", "server_optimizer": "adam"}, "schedule": {"name": "overlap"}}, "additive"),
    ],
)
def test_recipes_that_cannot_work_are_refused(change: Any, message: str) -> None:
    base = {"model": {"source": "tiny:llama"}, "method": "spafl", "data": {"source": "docstrings", "client_heldout": 2}}
    with pytest.raises(RecipeError, match=message):
        parse(base | change)
    assert parse(base).method["name"] == "spafl"


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="no linear modules in layers of Sequential"):
        make(nn.Sequential(nn.Linear(2, 2)), method.build("spafl"))
    assert issubclass(Rows, torch.autograd.Function)
