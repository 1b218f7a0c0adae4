"""Studies as files, and the arithmetic of comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from hocket.errors import RecipeError
from hocket.results import paired, table
from hocket.study import gather, overlay

STUDY = """
study = "small"
seeds = [3, 4]
versus = "b"
[tune]
set = { seed = 9, data = { heldout_source = "none", heldout_limit = 7, limit = "none" } }
[recipe]
turns = 2
[recipe.model]
source = "tiny:llama"
[recipe.data]
source = "rows.jsonl"
heldout_source = "test.jsonl"
limit = 50
[recipe.method]
name = "fedbcd"
layers_per_block = 1
[[variant]]
name = "a"
rates = [1e-4, 1e-3]
[[variant]]
name = "b"
like = "a"
set = { schedule = { name = "overlap" }, method = { layers_per_block = 3 } }
[[variant]]
name = "c"
rates = [5e-4]
set = { method = { name = "fedit", rank = 2 } }
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_variants_are_laid_over_the_recipe(tmp_path: Path) -> None:
    (study,) = gather([write(tmp_path / "s.toml", STUDY)])
    a, b, c = study.variant
    tuning = study.tuning(a)
    assert list(tuning) == [1e-4, 1e-3]
    assert {(r.seed, r.data.limit, r.data.heldout_limit, r.training.lr) for r in tuning.values()} == {
        (9, None, 7, 1e-4), (9, None, 7, 1e-3)
    }  # fmt: skip
    runs = study.runs(b, 1e-3)
    assert sorted(runs) == [3, 4]
    assert runs[3].data.limit == 50
    assert runs[3].build_method().layers_per_block == 3  # type: ignore[attr-defined]
    assert runs[3].build_schedule().ahead == 1
    assert runs[3].hash != runs[4].hash
    assert study.tuning(c) == {}
    assert "layers_per_block" not in study.runs(c, 5e-4)[3].method  # another method replaces the table


def test_equal_recipes_have_one_hash_whatever_they_are_called(tmp_path: Path) -> None:
    (one,) = gather([write(tmp_path / "s.toml", STUDY)])
    (two,) = gather([write(tmp_path / "t.toml", STUDY.replace('"small"', '"other"').replace('name = "c"', 'name = "d"'))])
    assert one.runs(one.variant[2], 5e-4)[3].hash == two.runs(two.variant[2], 5e-4)[3].hash


def test_plain_recipes_make_one_study(tmp_path: Path) -> None:
    text = '[model]\nsource = "tiny:llama"\n[data]\nsource = "docstrings"\n[method]\nname = "{}"\n[training]\nlr = {}\n'
    paths = [write(tmp_path / f"{m}.toml", text.format(m, lr)) for m, lr in (("fedit", 1e-3), ("fedbcd", 2e-3))]
    (study,) = gather(paths, [1, 2])
    assert [v.name for v in study.variant] == ["fedit", "fedbcd"]  # both are called "run", so the file names tell
    assert study.runs(study.variant[1], study.variant[1].rates[0])[2].training.lr == 2e-3
    assert study.seeds == [1, 2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('versus = "b"', 'versus = "x"', "no variant 'x'.*a, b, c"),
        ('name = "c"', 'name = "a"', "two variants"),
        ("seeds = [3, 4]", "seeds = []", "seeds"),
        ("seeds", "sedes", "sedes"),
        ("rank = 2", "rnk = 2", "variant 'c'.*rnk.*rank"),
        ("[recipe]", "[recipe", "not TOML"),
        ('study = "small"', 'study = "a/b"', "study"),
        ('heldout_source = "none", ', "", "variant 'a' would be tuned on the rows"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "names one twice"),
        ('like = "a"', 'like = "a"\nrates = [1e-3]', "leave one out"),
        ('name = "overlap"', 'name = "overlpa"', "variant 'b'.*overlap"),
    ],
)
def test_wrong_studies_name_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path / "s.toml", STUDY.replace(old, new))
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        gather([path])
    with pytest.raises(RecipeError, match="nowhere"):
        gather([tmp_path / "nowhere.toml"])


def test_two_studies_of_one_name_are_refused_and_seeds_are_for_recipes(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.toml", STUDY) for n in "st"]
    with pytest.raises(RecipeError, match="two files are called 'small'"):
        gather(paths)
    with pytest.raises(RecipeError, match="--seeds"):
        gather(paths[:1], [1])


def test_a_plain_recipe_that_is_wrong_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml.*trainin: unknown"):
        gather([write(tmp_path / "r.toml", '[model]\nsource = "tiny:llama"\n[trainin]\nlr = 1.0\n')])


def test_like_looks_in_its_own_study_first_and_rates_at_the_edge_are_told(tmp_path: Path) -> None:
    from hocket.compare import _choose, _tuned

    said: list[str] = []

    class Known:
        """A runner whose runs are done: the loss is the rate."""

        say = staticmethod(said.append)
        result = staticmethod(lambda recipe: {"loss": recipe.training.lr})

    (study,) = gather([write(tmp_path / "s.toml", STUDY)])
    a, b, _ = study.variant
    mine, other = _tuned(study, a, Known()), _tuned(study, a.model_copy(update={"rates": [7.0]}), Known())  # type: ignore[arg-type]
    assert mine.rate == 1e-4
    assert "edge" in said[0]
    assert _choose(b, {"a": other} | {"a": mine}).rate == 1e-4
    assert _choose(b, {"a": other}).rate == 7.0


def test_a_diverged_seed_is_summed_up_and_written(tmp_path: Path) -> None:
    import json

    from hocket.compare import SCORES, Chosen, summary
    from hocket.results import write as write_results

    (study,) = gather([write(tmp_path / "s.toml", STUDY.replace('versus = "b"', 'versus = "a"'))])
    blank = {**dict.fromkeys(SCORES), "git": "x", "start_loss": None, "heldout_rows": 5, "turns": 2, "moved": [], "clients": None, "groups": None, "error": [], "effective_rank": [], "jobs": [1], "curve": []}
    blank |= dict.fromkeys(("virtual_seconds", "up_bytes", "down_bytes", "catch_up_bytes", "wall_seconds", "local_steps"), 1.0)

    class Known:
        result = staticmethod(lambda recipe: blank | {"loss": float("inf") if recipe.seed == 4 else 1.0})

    chosen = {v.name: Chosen(v, 1e-3) for v in study.variant}
    found = summary(study, chosen, Known())  # type: ignore[arg-type]
    assert found["variants"]["b"]["sd"] is None
    assert found["variants"]["b"]["difference"] is None
    (path,) = write_results({"small": found}, tmp_path)
    read = json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert read["variants"]["b"]["losses"] == [1.0, "inf"]
    assert table(read) == table(found)


def test_overlay() -> None:
    below = {"a": {"name": "x", "p": 1, "q": {"r": 1}}, "b": 2, "c": {"d": 1}}
    assert overlay(below, {"a": {"q": {"s": 2}}, "b": "none"}) == {"a": {"name": "x", "p": 1, "q": {"r": 1, "s": 2}}, "c": {"d": 1}}
    assert overlay(below, {"a": {"name": "y"}})["a"] == {"name": "y"}
    assert below["b"] == 2
    assert overlay({"method": "fedit"}, {"method": {"rank": 2}}) == {"method": {"name": "fedit", "rank": 2}}


def test_paired_differences_are_students() -> None:
    a, b = [1.0, 1.3, 0.9, 1.2], [0.8, 1.2, 0.95, 1.0]
    found = paired(a, b)
    assert found is not None
    assert found["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    interval = stats.ttest_rel(a, b).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert paired([1.0], [2.0]) is None
    assert paired([1.0, float("inf")], [1.0, 1.0]) is None
    assert paired([2.0, 2.0], [2.0, 2.0])["p"] == 1.0  # type: ignore[index]


def test_a_table_says_who_diverged_and_who_has_one_seed() -> None:
    row = {
        "rate": 1e-3, "loss": float("inf"), "sd": None, "difference": None, "virtual_seconds": 2.0, "up_bytes": 1e6,
        "down_bytes": 2e6,
    }  # fmt: skip
    text = table({"versus": "a", "seeds": [0], "base_loss": 3.0, "variants": {"a": row | {"loss": 1.0}, "b": row}})
    assert "| start model | - | 3.0000 |" in text
    assert "| b | 0.001 | inf | - | - | 2.0 | 1.00 | 1.0 | 2.0 |" in text
