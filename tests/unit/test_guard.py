"""A site's Flower process imports what is installed there, and nothing that comes with an app."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hocket.deploy import guard

HELD = """import os, sys, tempfile
from hocket.deploy.guard import hold
shared, home = tempfile.gettempdir(), os.environ["FLWR_HOME"]
hold(home, os.environ["HOCKET_SITE"])
app = os.path.join(home, "apps", "x")
sys.path.insert(0, app)
"""


def held(home: Path, code: str, **env: str) -> str:
    """The end of what is printed by code in a process like a site's client app's, whose app lies in HOME/apps/x."""
    (home / "apps" / "x").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-P", "-c", HELD + code], env=os.environ | {"FLWR_HOME": str(home), "HOCKET_SITE": str(home.parent / "site")} | env, capture_output=True, text=True, timeout=120
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


SPOIL = "open({!r}, 'w').write('x')\n"


@pytest.mark.parametrize("name", ["evil", "evil.deep", "tabnanny", "evil.__main__"])
def test_a_module_of_the_apps_is_not_imported(tmp_path: Path, name: str) -> None:
    """Neither a package of its own, nor one without `__init__`, nor one with the name of an installed module."""
    app = tmp_path / "apps" / "x"
    path = app / Path(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(SPOIL.format(str(tmp_path / "spoiled")))
    last = held(tmp_path, f"import importlib; importlib.import_module({name!r})")
    assert last.startswith("ImportError: this site"), last
    assert not (tmp_path / "spoiled").exists()


def test_nor_one_that_it_brings_in_an_archive_or_by_a_link(tmp_path: Path) -> None:
    home = tmp_path / "home"
    app = home / "apps" / "x"
    app.mkdir(parents=True)
    with zipfile.ZipFile(app / "a.zip", "w") as z:
        z.writestr("zipped.py", SPOIL.format(str(tmp_path / "spoiled")))
    last = held(home, f"sys.path.insert(0, {str(app / 'a.zip')!r}); import zipped")
    assert last.startswith("ImportError: this site"), last
    (app / "real.py").write_text(SPOIL.format(str(tmp_path / "spoiled")))
    other = tmp_path / "installed"
    other.mkdir()
    (other / "linked.py").symlink_to(app / "real.py")
    assert held(home, "import linked", PYTHONPATH=str(other)).startswith("ImportError: this site")
    assert not (tmp_path / "spoiled").exists()


def test_an_app_cannot_put_its_own_hocket_before_the_installed_one(tmp_path: Path) -> None:
    fake = tmp_path / "apps" / "x" / "hocket" / "deploy"
    fake.mkdir(parents=True)
    for p in (fake / "__init__.py", fake.parent / "__init__.py", fake / "client_app.py"):
        p.write_text(SPOIL.format(str(tmp_path / "spoiled")))
    last = held(tmp_path, "import hocket.deploy.client_app as c; print(type(c.app).__name__)")
    assert last == "ClientApp"
    assert not (tmp_path / "spoiled").exists()


def test_what_it_writes_where_modules_are_looked_for_is_not_imported(tmp_path: Path) -> None:
    """An app's version can lead Flower out of the folder of apps, so a site's folder below one of Python's is no way in."""
    home, site = tmp_path / "berlin" / "flower", tmp_path / "berlin"
    (site / "runs").mkdir(parents=True)
    (site / "runs" / "evil.py").write_text(SPOIL.format(str(tmp_path / "spoiled")))
    env = {"HOCKET_SITE": str(site), "PYTHONPATH": str(tmp_path)}
    last = held(home, "import berlin.runs.evil", **env)
    assert last.startswith("ImportError: this site"), last
    assert not (tmp_path / "spoiled").exists()
    for root in (site / "runs", site, home, home / "apps"):
        last = held(home, "print('began')", **env | {"PYTHONPATH": str(root)})
        assert "give the site a folder that holds no installed packages" in last, last


def test_installed_modules_are_imported(tmp_path: Path) -> None:
    assert held(tmp_path, "import tabnanny, xml.dom.minidom, email.mime.text, hocket.deploy.courier; print('all')") == "all"


REFUSED = [
    "open(shared + '/hocket-x', 'w')", "open(os.environ['HOCKET_SITE'] + '/x', 'w')",
    "open(out + '/x', 'w')", "os.open(out + '/x', os.O_CREAT | os.O_WRONLY)", "os.mkdir(app + '/../../../outside/x')",
    "os.symlink('/', out + '/x')", "os.rename(app, out + '/x')", "os.system('true')", "os.fork()",
    "__import__('subprocess').run(['true'])", "os.execv('/bin/true', ['true'])",
]  # fmt: skip
TRYING = """
out, heard = {out!r}, []
for code in {codes!r}:
    try:
        exec(code)
        heard.append("done")
    except Exception as error:
        heard.append(type(error).__name__)
print(*heard)
"""


def test_no_file_is_written_elsewhere_and_no_process_started(tmp_path: Path) -> None:
    out = tmp_path / "outside"
    out.mkdir()
    heard = held(tmp_path / "home", TRYING.format(out=str(out), codes=[*REFUSED, "open(app + '/x', 'w').write('x')"])).split()
    assert heard == ["Refused"] * len(REFUSED) + ["done"]
    assert not any(out.iterdir())


def test_only_two_commands_can_be_started(tmp_path: Path) -> None:
    made = guard.commands(tmp_path / "bin")
    names = {p.name for p in made.iterdir()}
    assert {"flower-superexec", "flwr-clientapp", "flwr-serverapp"} <= names
    for name in names - set(guard.COMMANDS):
        done = subprocess.run([made / name, "--token", "x"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "this site runs client apps of hocket's" in done.stderr
    done = subprocess.run([made / "flwr-clientapp", "--help"], capture_output=True, text=True, timeout=120, env=os.environ | {"FLWR_HOME": str(tmp_path), "HOCKET_SITE": str(tmp_path)})
    assert "Run a Flower ClientApp" in done.stdout
