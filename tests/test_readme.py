"""What README and docs tell a user to do is done here: commands, recipes, the example method, links and figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hocket.recipe import parse
from hocket.study import gather

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(README, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_make_targets_exist_and_help_lists_them() -> None:
    out = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    named = [c.split()[1] for c in commands() if c.startswith("make ")]
    assert set(named) == {"demo", "test"}
    for target in ("demo", "test", "lint", "bench", "help"):
        assert f"make {target}" in out
    for target in named:
        assert subprocess.run(["make", "-n", "-C", str(ROOT), target], capture_output=True).returncode == 0
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("hocket ")])
def test_readme_commands_run(command: str, stories: Path, tmp_path: Path) -> None:
    """As written, but on the small model, so that they take seconds."""
    args = command.split()[1:]
    if args[0] in ("plan", "run"):
        args += ["--set", f"model.source={stories}", "--set", "data.packages=['peft','pydantic','stdlib','numpy']"]
        args += ["--set", "data.heldout_limit=8", "--set", "turns=2", "--set", "data.max_length=512", "--set", "data.template=plain"]
    if args[0] == "run":
        args += ["--out", str(tmp_path / "run"), "-q"]
    done = subprocess.run([sys.executable, "-m", "hocket", *args], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_readme_commands_exist_in_help() -> None:
    out = subprocess.run([sys.executable, "-m", "hocket", "--help"], env=ENV, capture_output=True, text=True, check=True).stdout
    for name in ("run", "resume", "plan", "compare", "methods", "models", "report", "export"):
        assert re.search(rf"\b{name}\b", out)
        assert f"hocket {name}" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_and_studies_parse_and_links_lead_somewhere(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    for block in blocks(text, "toml"):
        if "study" in tomllib.loads(block):
            (tmp_path / "study.toml").write_text(block)
            gather([tmp_path / "study.toml"])
        else:
            parse(tomllib.loads(block))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_example_method_of_the_docs_works(tmp_path: Path) -> None:
    """It is written to a file, imported, and run with overlap on a model that has biases."""
    (code,) = blocks((ROOT / "docs" / "adding-a-method.md").read_text(), "python")
    (tmp_path / "bias_only.py").write_text(code)
    check = (
        "import bias_only\nfrom worlds import language\n"
        "w = language('gpt2', meth='bias-only', sched='overlap').run()\n"
        "moved = {k for k in w.final if (w.final[k] != w.iterates[0][k]).any()}\n"
        "assert moved and all(k.endswith('bias') for k in moved), moved\n"
    )
    env = ENV | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_agents_file_is_ten_rules() -> None:
    lines = [line for line in (ROOT / "AGENTS.md").read_text().splitlines() if re.match(r"\d+\. ", line)]
    assert len(lines) == 10


def test_results_carry_the_commit_they_came_from() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert {r.stem for r in results} == {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")}
    compared = []
    for folder in sorted(p.parent.name for p in (ROOT / "benchmarks").glob("*/report.py")):
        studies = sorted((ROOT / "benchmarks" / folder).glob("*.toml"))
        compared += sorted((ROOT / "benchmarks" / folder / "results").glob("*.json"))
        assert {r.stem for r in compared if r.parent.parent.name == folder} == {
            tomllib.loads(p.read_text())["study"] for p in studies
        }
    for path in results + compared:
        assert re.fullmatch(r"[0-9a-f]{40}\+?( [0-9a-f]{40}\+?)*", json.loads(path.read_text())["git"]), path


def test_readme_figures_are_those_of_the_results() -> None:
    """Every number in README's tables of results stands in a committed result file."""
    text = "".join(p.read_text() for p in (ROOT / "benchmarks" / "results").glob("*.json"))
    known = {float(x) for x in re.findall(r"-?\d+\.?\d*", text)}
    section = README.split("## Measured")[1].split("## More")[0]
    rows = [line for line in section.splitlines() if line.startswith("|") and "---" not in line][1:]
    assert rows
    for row in rows:
        for number in re.findall(r"(?<![\w.])\d+\.\d+", row.split("|")[2]):
            assert any(abs(float(number) - k) <= 0.5 * 10 ** -len(number.split(".")[1]) + 1e-9 for k in known), (number, row)
