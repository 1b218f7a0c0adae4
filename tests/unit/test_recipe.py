"""Recipes: one file is one result, and every wrong field is named with its path."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from hocket.errors import RecipeError
from hocket.needs import note, unused
from hocket.recipe import load, parse

BASE: dict[str, Any] = {"model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}, "method": "fedbcd"}


def made(**more: Any) -> Any:
    return parse({**BASE, **more})


def test_a_recipe_survives_its_own_toml_with_its_hash() -> None:
    r = made(codec={"up": {"name": "feedback", "codec": "int8"}}, clients={"count": 3, "each": [{"up_mb_s": 2.0}]})
    assert parse(tomllib.loads(r.to_toml())).hash == r.hash


def test_the_hash_is_of_what_changes_results() -> None:
    assert made().hash == made(name="x", engine={"workers": 3, "tensorboard": True}).hash
    assert made().hash != made(seed=1).hash
    assert made().hash != made(method={"name": "fedbcd", "order": "reverse"}).hash
    assert made().hash != made(engine={"threads": 1}).hash


def test_presets_are_points_that_a_recipe_may_change() -> None:
    base = {k: v for k, v in BASE.items() if k != "method"}
    r = parse({**base, "preset": "parablock"})
    assert r.method == {"name": "fedbcd"}
    assert r.schedule == {"name": "overlap", "staleness": 1}
    r = parse({**base, "preset": "parablock", "schedule": {"name": "overlap", "staleness": 2}, "method": {"name": "fedbcd", "order": "reverse"}})
    assert r.build_schedule().ahead == 2
    assert r.build_method().order == "reverse"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turn": 3}, r"turn: unknown; did you mean 'turns'"),
        ({"turns": "x"}, r"turns: .*integer.*'x'"),
        ({"turns": 0}, r"turns: .*greater than or equal to 1"),
        ({"model": {}}, r"model\.source: Field required"),
        ({"model": {"source": "x", "tsk": "causal"}}, r"model\.tsk: unknown; did you mean 'task'"),
        ({"model": {"source": "x", "task": "casual"}}, r"model\.task"),
        ({"method": "fedbdc"}, r"method: there is no 'fedbdc'; did you mean 'fedbcd'"),
        ({"method": {"name": "fedbcd", "ordr": 1}}, r"method\.ordr: .*did you mean 'order'"),
        ({"method": {"name": "fedbcd", "layers_per_block": 0}}, r"method\.layers_per_block"),
        ({"method": {"layers_per_block": 1}}, r"method\.name: missing"),
        ({"schedule": "sink"}, r"schedule: there is no 'sink'; did you mean 'sync'"),
        ({"schedule": {"name": "overlap", "staleness": -1}}, r"schedule\.staleness"),
        ({"schedule": "overlap", "method": {"name": "fedavg", "server_optimizer": "adam"}}, r"schedule 'overlap' .* needs an additive step"),
        ({"schedule": {"name": "sync", "cohort": 9}}, r"schedule\.cohort: 9 clients"),
        ({"schedule": {"name": "sync", "cohort": 2, "minimum": 3}}, r"schedule\.minimum: 3"),
        ({"codec": {"up": "in8"}}, r"codec\.up: there is no 'in8'; did you mean 'int8'"),
        ({"codec": {"down": {"name": "feedback", "codec": "int8"}}}, r"codec\.down: error feedback"),
        ({"codec": {"upp": "raw"}}, r"codec\.upp: unknown; did you mean 'up'"),
        ({"training": {"lr": -1}}, r"training\.lr"),
        ({"training": {"lrr": 1}}, r"training\.lrr: unknown; did you mean 'lr'"),
        ({"training": {"precision": "bf16"}, "model": {"source": "x", "device": "cpu"}}, r"training\.precision: 'bf16' is for GPUs"),
        ({"data": {"source": "a.jsonl", "partition": "dirichlet"}}, r"data\.column"),
        ({"data": {"source": "a.jsonl", "partition": "shards"}}, r"data\.partition"),
        ({"clients": {"count": 2, "each": [{}, {}, {}]}}, r"clients\.each: 3 entries for 2"),
        ({"clients": {"each": [{"up_mbs": 1}]}}, r"clients\.each\.0\.up_mbs: .*did you mean 'up_mb_s'"),
        ({"clients": {"each": [{"up_mb_s": 0}]}}, r"clients\.each\.0\.up_mb_s"),
        ({"clients": {"device": {"up_mbs": 3}}}, r"clients\.device\.up_mbs: unknown; did you mean 'up_mb_s'"),
        ({"clients": {"device": {"online": [[3, 2]]}}}, r"clients\.device.*online"),
        ({"clients": {"spread": {"speed": 3}}}, r"clients\.spread\.speed"),
        ({"preset": "parablok"}, r"preset: there is no 'parablok'; did you mean 'parablock'"),
        ({"evaluation": {"gsm8k": "x"}, "model": {"source": "x", "task": "classification"}}, r"evaluation\.gsm8k"),
        ({"evaluation": {"rouge": 4}, "model": {"source": "x", "task": "classification"}}, r"evaluation\.rouge: a classification"),
        ({"evaluation": {"rouge": 0}}, r"evaluation\.rouge"),
    ],
)
def test_wrong_recipes_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made(**change)


def test_overrides_and_files(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('method = "fedbcd"\n[model]\nsource = "tiny:llama"\n[data]\nsource = "docstrings"\n')
    r = load(path, ["turns=3", "schedule.name=overlap", "schedule.staleness=2", "method.order=reverse", "clients.spread.up_mb_s=0.5"])
    assert r.turns == 3
    assert r.build_schedule().ahead == 2
    assert r.method == {"name": "fedbcd", "order": "reverse"}
    for bad, message in [("turns", "write it as"), ("model.source.x=1", "source"), ("trns=1", "did you mean 'turns'")]:
        with pytest.raises(RecipeError, match=message):
            load(path, [bad])
    path.write_text("turns = = 3")
    with pytest.raises(RecipeError, match=r"r\.toml' is not TOML"):
        load(path)
    with pytest.raises(RecipeError, match=r"none\.toml': No such file"):
        load(tmp_path / "none.toml")


def test_spread_draws_devices_by_seed_within_the_factor() -> None:
    r = made(clients={"count": 50, "device": {"step_seconds": 2.0}, "spread": {"step_seconds": 10.0}, "each": [{"step_seconds": 7.0}]})
    seconds = [d.step_seconds for d in r.devices()]
    assert seconds[0] == 7.0
    assert all(2.0 <= s <= 20.0 for s in seconds)
    assert max(seconds[1:]) / min(seconds[1:]) > 4
    assert seconds == [d.step_seconds for d in r.devices()]


def test_shipped_recipes_are_right() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    found = sorted(folder.glob("*.toml"))
    assert found
    for path in found:
        load(path)


def test_preset_async_is_a_schedule_and_a_codec_that_a_recipe_may_override() -> None:
    base = {"model": {"source": "tiny:llama"}, "data": {"source": "docstrings"}, "method": "fedit", "preset": "async"}
    r = parse(base)
    assert r.schedule["name"] == "fedfa"
    assert str(r.build_codec("up")) == "feedback(int4)"
    assert str(parse(base | {"codec": {"down": "half"}}).build_codec("up")) == "feedback(int4)"
    assert str(parse(base | {"codec": {"up": "raw"}}).build_codec("up")) == "raw"
    assert parse(base | {"schedule": "sync"}).schedule == {"name": "sync"}


def test_differences_go_down_to_clients_of_any_rank() -> None:
    for name in ("hlora", "hetlora"):
        r = made(method={"name": name, "rank": 4}, codec={"down": {"name": "int4"}}, clients={"count": 2, "ranks": [2, 4]})
        assert r.build_codec("down").differences
        assert sorted(d.rank or 0 for d in r.devices()) == [2, 4]


@pytest.mark.parametrize("clients", [{"count": 2, "ranks": [2, 4]}, {"count": 2, "each": [{"rank": 2}]}])
def test_ranks_that_a_method_passes_over_are_said(clients: dict[str, Any]) -> None:
    for name in ("fedit", "fedavg"):
        (line,) = unused(made(method=name, clients=clients))
        assert line.startswith("clients.ranks")
        assert f"'{name}'" in line
        assert "hlora" in line
        assert not unused(made(method=name))
        said: list[Any] = []
        note(made(method=name, clients=clients), [1, 1], None, said.append)  # type: ignore[arg-type]
        assert said == [{"what": "warning", "text": line}]
    assert not unused(made(method={"name": "hlora", "rank": 4}, clients=clients))


def test_a_client_of_a_larger_rank_than_the_servers_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"clients\.ranks.*rank 8.*method\.rank = 4"):
        made(method={"name": "hlora", "rank": 4}, clients={"count": 2, "ranks": [2, 8]})
