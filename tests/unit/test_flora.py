"""FLoRA: the stack is the mean of the products, merged exactly; who missed stacks catches up the cheaper way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from worlds import assemble, collate, language, tokens

from hocket.errors import RecipeError
from hocket.methods import Client, Update, method
from hocket.methods.flora import BASE, A, B
from hocket.models.tiny import tiny
from hocket.models.views import make
from hocket.sections import Training
from hocket.training import TorchTrainer
from hocket.tree import Tree, generator, nbytes

M = "layers.0.q"


def draw(*shape: int, key: Any = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("flora", key, *shape))


def state_of(m: Any, out: int = 7, inner: int = 5, rank: int = 2) -> Any:
    start = {M + A: draw(rank, inner), M + B: torch.zeros(out, rank).double(), M + BASE: draw(out, inner), "head": draw(3)}
    return m.init(start, 0)


def factors(client: int, rank: int, out: int = 7, inner: int = 5) -> Tree:
    return {M + A: draw(rank, inner, key=client), M + B: draw(out, rank, key=-client), "head": draw(3, key=client)}


def update(client: int, payload: Tree, job: int | None = None, version: int = 0) -> Update:
    return Update(client if job is None else job, client, version, version, payload)


@pytest.mark.parametrize("scaling", ["alpha/r", "constant"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (4, 1, 3)])
def test_the_merge_is_the_weighted_mean_of_the_products(ranks: tuple[int, ...], scaling: str) -> None:
    m = method.build({"name": "flora", "rank": 2, "alpha": 6.0, "server_lr": 0.5, "scaling": scaling})
    scales = [3.0 if scaling == "constant" else 6 / r for r in ranks]
    state = state_of(m)
    sent = [factors(c, r) for c, r in enumerate(ranks)]
    weights = [1.0, 5.0, 2.0]
    for c, (s, r) in enumerate(zip(sent, ranks, strict=True)):
        assert m.check(state, replace(update(c, s), traits={"rank": r})) is None
    after = m.step(state, [update(c, s) for c, s in enumerate(sent)], weights)
    ideal = sum(w / 8 * x * s[M + B] @ s[M + A] for w, s, x in zip(weights, sent, scales, strict=True))
    moved = after["params"][M + BASE] - state["params"][M + BASE]
    assert torch.allclose(moved, 0.5 * ideal, atol=1e-12)
    squared = sum((w / 8) ** 2 * x * s[M + B] @ s[M + A] for w, s, x in zip(weights, sent, scales, strict=True))
    assert not torch.allclose(moved, 0.5 * squared)
    head = sum(w / 8 * s["head"] for w, s in zip(weights, sent, strict=True))
    assert torch.allclose(after["params"]["head"], state["params"]["head"] + 0.5 * head, atol=1e-12)
    assert torch.linalg.matrix_rank(moved) == min(5, sum(ranks))


def test_order_of_clients_and_split_of_a_client_do_not_matter() -> None:
    m = method.build({"name": "flora", "rank": 2})
    state = state_of(m)
    sent = [update(c, factors(c, 2)) for c in range(3)]
    one = m.step(state, sent, [1.0, 2.0, 1.0])["params"]
    other = m.step(state, sent[::-1], [1.0, 2.0, 1.0])["params"]
    twice = m.step(state, [sent[0], sent[1], sent[1], sent[2]], [1.0, 1.0, 1.0, 1.0])["params"]
    for k in one:
        assert torch.allclose(one[k], other[k], atol=1e-12)
        assert torch.allclose(one[k], twice[k], atol=1e-12)


def after_rounds(m: Any, rounds: int, rank: int = 1, out: int = 40, inner: int = 30) -> list[Any]:
    states = [state_of(m, out, inner, rank)]
    for t in range(rounds):
        states.append(m.step(states[-1], [update(c, factors(10 * t + c, rank, out, inner), version=t) for c in range(2)], [1, 1]))
    return states


def test_catching_up_takes_the_cheaper_way_and_gives_the_same_bits() -> None:
    m = method.build({"name": "flora", "rank": 1})
    states = after_rounds(m, 12)
    changed = {M + BASE: 12, "head": 12}
    dense, stack = 40 * 30, 2 * (40 + 30)
    for since in range(12):
        payload = m.ship(states[12], Client(0), 12, since, changed)
        missed = 12 - since
        assert (M + BASE in payload) == (missed * stack >= dense), since
        held = m.load(states[since]["params"], payload)
        assert all(torch.equal(held[k], states[12]["params"][k]) for k in held)
        size = sum(v.numel() for k, v in payload.items() if k != "head")
        assert size == min(dense, missed * stack)
    kept = sum(v.numel() for s in states[12]["news"].values() for v in s.values())
    assert kept <= dense  # the server never keeps more than one dense copy in stacks


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merged_logits_are_those_of_the_stacked_adapters(arch: str) -> None:
    """On nn.Linear and on GPT-2's Conv1D, square (c_proj) and not (c_attn, GQA's v_proj)."""
    targets = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}[arch]
    m: Any = method.build({"name": "flora", "rank": 3, "alpha": 5.0, "targets": targets})
    model, _ = tiny(arch, vocab=64, layers=2, width=16)
    view = make(model, m, "causal", 0)
    start = view.start()
    assert any(x.shape[0] == x.shape[1] for k, x in start.items() if k.endswith(BASE))
    assert any(x.shape[0] != x.shape[1] for k, x in start.items() if k.endswith(BASE))
    batch = collate(tokens(0, 2, 64))
    adapters = {k: 0.3 * torch.randn(v.shape, generator=generator(k)) for k, v in start.items() if "lora_" in k}
    with torch.no_grad():
        view.place(start | adapters)
        beside = view.model(batch["input_ids"]).logits
        state = m.step(m.init(start, 0), [update(0, adapters)], [1.0])
        view.place(m.export(state))
        merged = view.model(batch["input_ids"]).logits
        view.place(start)
        before = view.model(batch["input_ids"]).logits
    assert torch.allclose(merged, beside, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-2)


def test_every_round_starts_from_fresh_factors_of_each_clients_own() -> None:
    w = language(meth={"name": "flora", "rank": 2}, turns=3).run()
    a = next(k for k in w.iterates[0] if k.endswith(A))
    assert len({w.starts[c, t][a].sum().item() for c in range(3) for t in range(3)}) == 9
    assert all(not start[k].any() for start in w.starts.values() for k in start if k.endswith(B))
    base = a.removesuffix(A) + BASE
    rank = torch.linalg.matrix_rank((w.iterates[1][base] - w.iterates[0][base]).double(), tol=1e-6)
    assert 2 < rank <= 6  # more than one adapter could hold


def test_total_change_is_the_sum_of_the_rounds() -> None:
    w = language(meth={"name": "flora", "rank": 2}, turns=3).run()
    m: Any = w.simulation.server.method
    for base in (k for k in w.final if k.endswith(BASE)):
        q = base.removesuffix(BASE)
        ideal = sum(
            m.scale(q) / 3 * w.deltas[c, t][q + B] @ (w.deltas[c, t][q + A] + w.starts[c, t][q + A]) for c in range(3) for t in range(3)
        )
        assert torch.allclose(w.final[base] - w.iterates[0][base], ideal, atol=1e-6)


@pytest.mark.parametrize("sched", ["sync", {"name": "overlap", "staleness": 2}])
def test_simulated_clients_hold_what_loading_gives(sched: Any) -> None:
    """The short cut of the simulation (the server's own view) against a client that loads every packet itself."""
    w = language(meth={"name": "flora", "rank": 1}, sched=sched if sched != "sync" else {"name": "sync", "cohort": 2}, turns=6)
    server, downlink = w.simulation.server, w.simulation.downlink
    held = {c: dict(server.state["params"]) for c in server.clients}
    send, seen = downlink.send, []

    def checking(job: Any, s: Any) -> Any:
        download = send(job, s)
        held[job.client] = s.method.load(held[job.client], job.payload)
        assert all(torch.equal(held[job.client][k], download.view[k]) for k in download.view)
        seen.append(job.since)
        return download

    downlink.send = checking  # type: ignore[method-assign]
    w.run()
    assert len(seen) >= 12


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({M + A: torch.zeros(2, 6).double()}, "shapes"),
        ({M + B: torch.zeros(7, 3).double()}, "shapes"),
        ({M + A: torch.full((2, 5), float("nan")).double()}, "not finite"),
        ({M + BASE: torch.zeros(7, 5).double()}, "not a client's"),
        ({"head": torch.zeros(4).double()}, "head"),
        ({"x": torch.zeros(4).double()}, "unknown"),
    ],
)
def test_updates_that_do_not_fit_are_refused(change: Tree, reason: str) -> None:
    m = method.build({"name": "flora", "rank": 2})
    assert reason in str(m.check(state_of(m), update(0, factors(0, 2) | change)))


def test_more_rank_than_a_client_has_is_refused() -> None:
    m = method.build({"name": "flora", "rank": 2})
    wide = replace(update(0, factors(0, 3)), traits={"rank": 3})
    assert m.check(state_of(m), wide) is None
    assert "has rank 3, and this client's is 2" in str(m.check(state_of(m), replace(wide, traits={})))


def test_one_factor_alone_is_refused() -> None:
    m = method.build({"name": "flora", "rank": 2})
    payload = factors(0, 2)
    del payload[M + B]
    assert "needs both" in str(m.check(state_of(m), update(0, payload)))


def test_bytes_up_are_the_factors_and_down_the_stack() -> None:
    w = language(meth={"name": "flora", "rank": 1}, turns=3, width=64, clients=2)
    small = {k: v for k, v in w.final.items() if "lora_" in k}
    w.run()
    jobs, names = 6, len(small)
    up, down = w.simulation.ledger.bytes["up"], w.simulation.ledger.bytes["down"]
    assert jobs * nbytes(small) < up < jobs * (nbytes(small) + 200 * names)
    # two clients: the stack holds two adapters; the first turn's download is empty
    assert 4 * 2 * nbytes(small) < down < 4 * 2 * nbytes(small) + jobs * 200 * names


def test_what_florist_sends_holds_nothing_that_it_does_not_send() -> None:
    m: Any = method.build({"name": "florist", "rank": 2, "energy": 0.5})
    a, b = m.stacked(M, [(factors(c, 2), 0.5) for c in range(2)])
    assert len(a) < 4
    assert a.is_contiguous()
    assert b.is_contiguous()


def test_a_new_head_is_averaged_beside_the_stack() -> None:
    model, _ = tiny("bert", "classification", vocab=64, layers=2, width=16, num_labels=3)
    m = method.build({"name": "flora", "rank": 2})
    view = make(model, m, "classification", 0)
    rows = [[{"ids": t, "label": (i + c) % 3} for i, t in enumerate(tokens(c, 4))] for c in range(2)]

    def batch(chosen: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.stack([r["ids"] for r in chosen])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([r["label"] for r in chosen])}

    trainer = TorchTrainer(view, rows, batch, Training.model_validate({"lr": 1e-2, "local_steps": 2}))
    w = assemble(view, trainer, [4, 4], m, "sync", 2, "raw", "raw").run()
    head = [k for k in w.final if "classifier" in k]
    assert head
    assert all(not torch.equal(w.final[k], w.iterates[0][k]) for k in head)


def test_what_would_carry_over_to_other_factors_is_refused() -> None:
    from hocket.recipe import parse

    data = {"model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}, "method": "flora"}
    with pytest.raises(RecipeError, match=r"codec\.up.*new factors"):
        parse(data | {"codec": {"up": {"name": "feedback", "codec": "int8"}}})
    with pytest.raises(RecipeError, match=r"optimizer_state.*new factors"):
        parse(data | {"training": {"optimizer_state": "keep"}})
    model, _ = tiny("gpt2", vocab=64, layers=2, width=16)
    with pytest.raises(RecipeError, match=r"method\.targets.*tied"):
        make(model, method.build({"name": "flora", "targets": ["lm_head"]}), "causal", 0)


def test_adapters_on_embeddings_are_refused() -> None:
    for name in ("fedit", "ffa-lora", "flora"):
        model, _ = tiny("llama", vocab=64, layers=2, width=16)
        with pytest.raises(RecipeError, match="embeddings"):
            make(model, method.build({"name": name, "targets": ["embed_tokens"]}), "causal", 0)
