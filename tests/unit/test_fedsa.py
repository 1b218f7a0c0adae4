"""FedSA-LoRA: A is common, B and head stay at home, and a client is scored by what it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from worlds import World, collate, language, tokens

from hocket import run, store
from hocket.compare import Chosen, summary
from hocket.compare import _perform as performed
from hocket.errors import RecipeError, StoreError
from hocket.evaluate import heldout, pooled
from hocket.experiment import Experiment
from hocket.export import export
from hocket.methods import Client, Local, Update, method
from hocket.methods.fedsa import OWN
from hocket.methods.lora import A, B
from hocket.models import load
from hocket.recipe import parse
from hocket.report import build, read
from hocket.results import table
from hocket.study import Study
from hocket.tree import Tree, digest, generator

SPEC = {"name": "fedsa-lora", "rank": 2}


def memories(w: World) -> list[Tree]:
    sim = w.simulation
    return [dict(sim._remembered(c)) for c in range(len(sim.devices))]


def test_only_a_travels_and_b_never_meets_another_client() -> None:
    """Against each client trained alone with A given: what others do reaches it through A and nothing else."""
    w = language(meth=SPEC, turns=4)
    start, sent = dict(w.final), []
    receive = w.simulation.server.receive
    w.simulation.server.receive = lambda u: (sent.append(set(u.payload)), receive(u))[1]  # type: ignore[method-assign]
    w.run()
    assert all(k.endswith(A) for names in sent for k in names)
    assert len(sent) == 12
    by_hand = language(meth=SPEC, turns=4)
    mine: list[Tree] = [{} for _ in range(3)]
    view = start
    for turn in range(4):
        total = dict.fromkeys((k for k in start if k.endswith(A)), 0.0)
        weights = []
        for c in range(3):
            own = {k.removeprefix(OWN): v for k, v in mine[c].items()}
            here = Local(c, view, {}, turn, 4, turn, 7, by_hand.trainer)
            delta = here.fit(view | own)
            mine[c] = {OWN + k: (view | own)[k] + d for k, d in delta.items() if k.endswith(B)}
            weights.append(here.metrics["examples"])
            total = {k: total[k] + weights[-1] * delta[k] for k in total}
        view = view | {k: view[k] + v / sum(weights) for k, v in total.items()}
    found = memories(w)
    for c in range(3):
        assert all(torch.allclose(found[c][k], mine[c][k], atol=1e-6) for k in mine[c])
    assert all(torch.allclose(w.final[k], view[k], atol=1e-6) for k in view)
    assert all(torch.equal(w.final[k], start[k]) for k in start if k.endswith(B))
    assert len({digest(m) for m in found}) == 3


def test_with_frozen_equal_bs_the_mean_of_a_is_that_of_the_products() -> None:
    """s B mean(A_i) = mean(s B A_i), in float64."""
    m = method.build(SPEC)
    draw = lambda key, *shape: torch.randn(*shape, dtype=torch.float64, generator=generator("fedsa", key))
    params = {"q" + A: draw("a", 2, 5), "q" + B: draw("b", 7, 2)}
    state = m.init(params, 0)
    sent = [Update(i, i, 0, 0, {"q" + A: draw(i, 2, 5)}) for i in range(3)]
    after = m.step(state, sent, [1.0, 2.0, 5.0])["params"]
    want = sum(w / 8 * params["q" + B] @ (params["q" + A] + u.payload["q" + A]) for u, w in zip(sent, (1, 2, 5), strict=True))
    assert torch.allclose(after["q" + B] @ after["q" + A], want, atol=1e-13)
    assert "own" in m.check(state, Update(0, 0, 0, 0, {"q" + B: draw("x", 7, 2)}))


def test_the_first_step_cannot_move_a_and_the_second_can() -> None:
    for steps, moved in ((1, False), (2, True)):
        w = language(meth=SPEC, turns=1, steps=steps)
        before = dict(w.final)
        w.simulation.run()
        assert any(not torch.equal(w.final[k], before[k]) for k in before if k.endswith(A)) == moved


@pytest.mark.parametrize("sched", ["sync", "overlap", "fedbuff", "fedasync"])
def test_a_lost_update_keeps_its_b_and_every_client_its_own(sched: str) -> None:
    """A third of the jobs is lost on the way; whoever trained remembers, and nobody else's B is in anybody's memory."""
    w = language(meth=SPEC, sched=sched, turns=6, loss=0.3)
    w.run()
    for c, memory in enumerate(memories(w)):
        own = {k for k in memory if k.startswith(OWN)}
        trained = {client for client, _ in w.deltas}
        assert bool(own) == (c in trained)
        assert not any(k.endswith(A) for k in own)
        assert all(torch.isfinite(memory[k]).all() for k in own)


def test_personal_models_learn_their_own_rows_better_than_one_for_all() -> None:
    """Clients whose tokens differ: each one's model on rows like its own, against FedIT's one model."""
    more = {"turns": 12, "training": {"lr": 2e-2}, "width": 16, "layers": 2}
    ours, fedit = language(meth=SPEC | {"rank": 4}, **more), language(meth={"name": "fedit", "rank": 4}, **more)
    for w in (ours, fedit):
        w.simulation.run()
    batches = [collate(tokens(c, 3 + c)) for c in range(3)]
    m = ours.simulation.server.method
    own = [float(ours.trainer.loss(m.personalized(ours.final, x), b)) for x, b in zip(memories(ours), batches, strict=True)]
    one = [float(fedit.trainer.loss(fedit.final, b)) for b in batches]
    nobody = [float(ours.trainer.loss(ours.final, b)) for b in batches]  # the server's B = 0: the start model
    assert sum(own) < sum(one) < sum(nobody)


def test_pooled_results_are_those_of_the_rows_together() -> None:
    w = language(meth="fedavg", turns=1)
    rows = [{"input_ids": t, "labels": t} for c in range(3) for t in tokens(c, 2 + c)]
    batch = lambda chosen: collate([r["input_ids"] for r in chosen])
    parts = [rows[:2], rows[2:5], rows[5:]]
    found = pooled([heldout(w.trainer.view.model, p, batch) for p in parts])
    whole = heldout(w.trainer.view.model, rows, batch)
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert {k: found[k] for k in ("n", "tokens")} == {k: whole[k] for k in ("n", "tokens")}
    shares = [{"loss": 1.0, "n": 4, "accuracy": 0.75}, {"loss": 2.0, "n": 6, "accuracy": 0.5}]
    assert pooled(shares)["accuracy"] == 0.6
    assert pooled(shares)["loss"] == pytest.approx(1.6)


def recipe(tmp_path: Path, meth: Any, **more: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        words = ("good film", "bad film", "fine song", "dull song")
        lines = [{"text": f"{words[i % 4]} number {i}", "label": int(i % 4 in (0, 2))} for i in range(80)]
        path.write_text("\n".join(map(json.dumps, lines)))
    return parse({
        "name": meth, "turns": 3, "model": {"source": "tiny:bert", "task": "classification"}, "method": {"name": meth},
        "data": {"source": str(path), "client_heldout": 5, "max_length": 32}, "clients": {"count": 3},
        "training": {"local_steps": 3, "lr": 5e-3}, "schedule": {"name": "sync"}, **more,
    })  # fmt: skip


def test_a_run_scores_each_client_s_own_model_head_included(tmp_path: Path) -> None:
    """From the checkpoint: common A, own B, own head, own held-out rows; and a resumed run says the same."""
    r = recipe(tmp_path, "fedsa-lora")
    out = run.start(r, tmp_path / "run")
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    evals = [x for x in rows if x["what"] == "eval"]
    assert [x["version"] for x in evals] == [0, 1, 2, 3]
    last = evals[-1]
    assert last["personal"] is True
    assert (last["personal_loss"], last["personal_accuracy"]) == (last["loss"], last["accuracy"])
    assert last["n"] == 15
    e = Experiment(r)
    spool = store.Spool(out / "spool")
    saved, _ = store.load(out / "checkpoint", r.hash, spool)
    engine = saved["engine"]
    spool.load_state_dict(engine["spool"])
    view = e.method.export(engine["server"]["state"])
    heads = set()
    for c in range(3):
        memory = dict(spool.get(engine["memory"][c]))
        own = e.method.personalized(view, memory)
        head = {k: v for k, v in own.items() if "classifier" in k or "score" in k}
        assert head
        assert not any(torch.equal(v, view[k]) for k, v in head.items())
        heads.add(digest(head))
        e.trainer.place(own)
        assert heldout(e.view.model, e.data.own[c], e.collate)["loss"] == pytest.approx(last["clients"][c], rel=1e-5)
    assert len(heads) == 3
    at_start = heldout_of(e, view)
    assert evals[0]["loss"] == pytest.approx(at_start, rel=1e-5)


def test_a_client_s_model_is_exported_as_it_was_scored(tmp_path: Path) -> None:
    r = recipe(tmp_path, "fedsa-lora")
    out = run.start(r, tmp_path / "run")
    for client in (None, 3, -1):
        with pytest.raises(StoreError, match="name one, --client 0 to 2"):
            export(out, tmp_path / "no", client=client)
    last = read(out).evals[-1]
    e = Experiment(r)
    for c in (0, 2):
        assert export(out, tmp_path / f"adapter{c}", client=c) == "adapter"
        base = load("tiny:bert", task="classification", num_labels=2, seed=r.seed).model
        opened = PeftModel.from_pretrained(base, tmp_path / f"adapter{c}")
        assert heldout(opened, e.data.own[c], e.collate)["loss"] == pytest.approx(last["clients"][c], rel=1e-5)
    other = run.start(recipe(tmp_path, "fedit"), tmp_path / "other")
    with pytest.raises(StoreError, match="leave out --client"):
        export(other, tmp_path / "no", client=0)


def heldout_of(e: Experiment, view: Tree) -> float:
    """The loss of the start model on all clients' own rows: nobody has trained."""
    return float(e.evaluate_clients(lambda client: view)["loss"])


def test_reports_say_whose_model_it_is(tmp_path: Path) -> None:
    ours = run.start(recipe(tmp_path, "fedsa-lora"), tmp_path / "ours")
    other = run.start(recipe(tmp_path, "fedit"), tmp_path / "other")
    mine, theirs = read(ours), read(other)
    assert mine.label == "fedsa-lora (personalized)"
    assert mine.personal
    assert not theirs.personal
    assert mine.summary()["final_loss"] == mine.evals[-1]["personal_loss"]
    assert {"clients_loss", "clients_accuracy", "clients_n"} <= theirs.evals[-1].keys()
    assert not any("clients_loss" in x or "personal" in x for x in theirs.evals[:-1])
    page = build([other, ours], tmp_path / "page.html").read_text()
    assert "fedsa-lora (personalized)" in page
    assert "own held-out rows" in page
    assert "own held-out rows" not in build([other], tmp_path / "other.html").read_text()


def test_a_comparison_holds_all_to_the_clients_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {n: recipe(tmp_path, n) for n in ("fedsa-lora", "fedit")}
    done = {r.hash: performed(r.to_toml(), str(tmp_path / n)) for n, r in recipes.items()}

    class Known:
        result = staticmethod(lambda r: done[r.hash])

    study = Study.model_construct(study="x", seeds=[0], versus="fedit", variant=[])
    variants = {n: type("V", (), {"name": n})() for n in recipes}
    monkeypatch.setattr(Study, "runs", lambda self, variant, rate: {0: recipes[variant.name]})
    found = summary(study, {n: Chosen(v, 1e-3) for n, v in variants.items()}, Known())  # type: ignore[arg-type]
    last = read(tmp_path / "fedit").evals[-1]
    assert found["variants"]["fedit"]["loss"] == last["clients_loss"] != last["loss"]
    assert found["heldout_rows"] == [15]
    shown = table(found)
    assert "fedsa-lora (personalized)" in shown
    assert "own held-out loss" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"source": "docstrings"}}, r"data\.client_heldout: 'fedsa-lora'.*say how many"),
        ({"evaluation": {"gsm8k": "x"}}, r"evaluation\.gsm8k: 'fedsa-lora'"),
        ({"evaluation": {"rouge": 4}}, r"evaluation\.rouge: 'fedsa-lora'"),
    ],
)
def test_recipes_without_rows_to_score_on_are_refused(change: Any, message: str) -> None:
    base = {"model": {"source": "tiny:llama"}, "method": "fedsa-lora", "data": {"source": "docstrings", "client_heldout": 2}}
    with pytest.raises(RecipeError, match=message):
        parse(base | change)
    assert parse(base).method["name"] == "fedsa-lora"
    assert method.build("fedsa-lora").send({"params": {"x": torch.zeros(1)}}, Client(0), 0)
