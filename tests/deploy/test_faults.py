"""One run, on real processes, that outlives all of them, a full disk, outsiders and a foreign app, and makes the model
of `hocket run`. Stages of one fleet, in order: to start one takes longer than any of them."""

from __future__ import annotations

import json
import os
import resource
import signal
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fleet import Fleet

from hocket.deploy import init
from hocket.deploy.launch import flower

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
    pytest.mark.timeout(600),
]
TURNS = 7
WORKER, COURIER, NODE, APP, LINK = (
    "-m hocket.deploy.work ", "guard flwr-clientapp", "bin/flower-supernode", "bin/flwr-serverapp", "bin/flower-superlink"
)  # fmt: skip


SLIP = """import os, sys, time
if any(a.endswith("flower-supernode") for a in sys.orig_argv) and "a-site" in os.environ.get("HOCKET_SITE", ""):
    import flwr.supernode.start_client_internal as node
    pull = node._pull_and_store_message
    def slipped(**how):
        def given_up(run_id, message_id):
            os.unlink({mark!r})
            sent = lambda: any(e.message.metadata.reply_to_message_id == message_id for e in how["state"].msg_store.values())
            over = lambda: all(t.status.status == "finished" for t in how["state"].get_tasks())
            for _ in range(600):
                if sent() and over():
                    break
                time.sleep(0.1)
            raise OSError("as if the run had ended")
        if os.path.exists({mark!r}):
            how["confirm_message_received"] = given_up
        return pull(**how)
    node._pull_and_store_message = slipped
"""
"""Gives up a message when its client app has replied already, if a file is there: Flower does so when a run ends then."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    made = Fleet(["a", "b"], turns=TURNS, schedule='name = "sync"\nminimum = 2')
    (faults := made.folder / "faults").mkdir()
    (faults / "sitecustomize.py").write_text(SLIP.format(mark=str(made.folder / "slip")))
    made.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(faults), made.env.get("PYTHONPATH")]))
    try:
        made.serve()
        made.join_all()
        yield made
    finally:
        made.close()


def again(fleet: Fleet, word: str, site: str | None, old: int) -> None:
    fleet.until(lambda: fleet.pids(word, site) not in ([], [old]), f"new '{word}'")


def test_a_worker_that_was_killed_is_sent_its_job_again(fleet: Fleet) -> None:
    assert fleet.reach(1)
    again(fleet, WORKER, "a", fleet.kill(WORKER, "a"))
    assert fleet.reach(2)


def test_a_courier_and_a_supernode_that_were_killed_come_back(fleet: Fleet) -> None:
    """Both take a minute, in which Flower waits for them; what outsiders try meanwhile fails."""
    fleet.need(2)
    fleet.kill(COURIER, "a")
    node = fleet.kill(NODE, "b")
    nobody_gets_in(fleet)
    again(fleet, NODE, "b", node)
    assert fleet.reach(3)


def nobody_gets_in(fleet: Fleet) -> None:
    before = (fleet.run / "hub" / "superlink.log").read_text().count("Created run")
    assert fleet.listening(fleet.inner) == {"127.0.0.1"}
    trusted = ssl.create_default_context(cafile=str(fleet.server / "ca.crt"))
    with httpx.Client(verify=trusted, timeout=60, headers={"content-type": "application/protobuf"}) as http:
        inner, gate = f"https://127.0.0.1:{fleet.inner}", f"https://127.0.0.1:{fleet.port}"
        for path in ("control/start-run", "control/list-runs", "control/register-node", "runtime/acquire-task", "runtime/pull-task-input"):
            assert http.post(f"{inner}/v1/{path}").status_code != 404, path  # what the gate hides is there
            for odd in (f"/v1/{path}", f"/v1/fleet/..%2f{path}", f"/v1/fleet/%2e%2e/{path}", f"//v1/{path}", f"/v1/Fleet/../{path}"):
                answer = http.post(httpx.URL(f"{gate}/", raw_path=odd.encode()))
                assert (answer.status_code, answer.text) == (404, "not found"), odd
        for path in ("activate-node", "pull-messages", "push-messages", "get-run", "get-fab", "pull-object"):
            answer = http.post(f"{gate}/v1/fleet/{path}")
            assert answer.status_code == 401, f"{path}: {answer.status_code} {answer.text}"
    with httpx.Client(timeout=30) as http, pytest.raises(httpx.ConnectError, match="(?i)certificate"):
        http.get(f"https://127.0.0.1:{fleet.port}/v1/fleet/activate-node")
    other = init.init(fleet.folder / "other", ["a"], "127.0.0.1")
    key, ca = ["--auth-supernode-private-key", other / "sites" / "a" / "node.key"], fleet.server / "ca.crt"
    mine = ["--auth-supernode-private-key", fleet.at("a") / "node.key"]
    tries = {
        "no key": ["--root-certificates", ca],
        "a key that is not registered": ["--root-certificates", ca, *key],
        "a server of another authority": ["--root-certificates", other / "server" / "ca.crt", *mine],
    }
    started = {
        name: fleet.start(
            name, flower("flower-supernode"), "--superlink", f"127.0.0.1:{fleet.port}", "--host", "127.0.0.1",
            "--port", fleet.spare[i], "--max-retries", 1, *more, env={"FLWR_HOME": str(fleet.folder / f"out{i}")},
        )
        for i, (name, more) in enumerate(tries.items())
    }  # fmt: skip
    home = fleet.folder / "stranger"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "hub"\n[superlink.hub]\naddress = "127.0.0.1:{fleet.port}"\nroot-certificates = "{ca}"\n'
    )
    assert "run-id" not in fleet.flwr(home, "run", init.app(fleet.folder / "app"), "hub", "--format", "json")
    for name, process in started.items():
        fleet.until(lambda process=process: process.poll() is not None, f"end of a SuperNode with {name}")
        assert process.returncode != 0, name
        assert "SuperNode ID" not in (fleet.folder / f"{name}.log").read_text(), name
    assert (fleet.run / "hub" / "superlink.log").read_text().count("Created run") == before


def test_a_supernode_that_is_a_reply_behind_is_brought_into_step(fleet: Fleet) -> None:
    fleet.need(3)
    (mark := fleet.folder / "slip").touch()
    node = fleet.own("a") / "supernode.log"
    fleet.until(lambda: "as if the run had ended" in node.read_text(), "message that is given up")
    assert fleet.reach(4)
    fleet.until(lambda: "Task stopped" in node.read_text(), "message without a reply")
    assert not mark.exists()


def test_a_server_app_that_was_killed_is_submitted_again(fleet: Fleet) -> None:
    fleet.need(4)
    fleet.kill(APP)
    fleet.until(lambda: fleet.resubmitted() == 1 and fleet.pids(APP), "server app again")
    assert fleet.reach(5)


def test_a_full_disk_ends_the_server_app_and_room_lets_it_go_on(fleet: Fleet) -> None:
    """The limit of a process's files is what a full disk is to it: a write that fails."""
    fleet.need(5)
    for pid in fleet.pids(APP):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    fleet.until(lambda: fleet.resubmitted() == 2 and fleet.pids(APP), "server app with room on its disk")
    assert fleet.reach(6)


def test_sites_run_no_code_but_what_is_installed(fleet: Fleet) -> None:
    """A foreign app is submitted on the server's own machine, where that can be done. The run is held meanwhile, so
    that it does not end before."""
    fleet.need(6)
    for pid in fleet.pids(APP):
        os.kill(pid, signal.SIGSTOP)
    marks, app = fleet.folder / "marks", foreign(fleet.folder / "foreign", fleet.folder / "marks")
    marks.mkdir()
    code = "import foreign.client_app"
    subprocess.run([sys.executable, "-c", code], cwd=app, check=True, timeout=60)
    (marks / "client").unlink()  # it does write where nothing keeps it from it
    out = fleet.flwr(fleet.run / "hub" / "flower", "run", app, "hub", "--format", "json")
    assert "run-id" in out, out
    fleet.until((marks / "server").exists, "answer to a foreign app")
    heard = json.loads((marks / "server").read_text())
    assert len(heard) == 2
    assert all("runs only code that is installed on it" in h and "'foreign" in h for h in heard), heard
    assert not (marks / "client").exists()
    for site in fleet.sites:
        assert "runs only code that is installed on it" in (fleet.own(site) / "supernode.log").read_text()


def foreign(folder: Path, marks: Path) -> Path:
    """An app of somebody else's, whose client side writes a file as soon as it is imported."""
    package = folder / "foreign"
    package.mkdir(parents=True)
    project = init.PYPROJECT.replace("hocket.deploy.", "foreign.").replace('"hocket-app"', '"foreign"')
    (folder / "pyproject.toml").write_text(project)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(
        f"import pathlib\npathlib.Path({str(marks / 'client')!r}).write_text('x')\n"
        "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    )
    (package / "server_app.py").write_text(f"""import json, pathlib, time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    replies = list(grid.send_and_receive([Message(RecordDict(), dst_node_id=n, message_type="train") for n in nodes]))
    heard = [r.error.reason if r.has_error() else "done" for r in replies]
    path = pathlib.Path({str(marks / 'server')!r})
    path.with_suffix(".part").write_text(json.dumps(heard))
    path.with_suffix(".part").rename(path)
""")
    return folder


def test_a_superlink_that_was_killed_is_started_and_the_run_goes_on(fleet: Fleet) -> None:
    fleet.need(6)
    held = fleet.pids(APP)
    fleet.kill(LINK)
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    fleet.end()
    assert fleet.resubmitted() >= 3


def test_the_model_is_that_of_the_simulation(fleet: Fleet) -> None:
    fleet.need(TURNS)
    assert fleet.model() == fleet.simulated()


def test_nothing_was_lost_or_counted_twice(fleet: Fleet) -> None:
    fleet.need(TURNS)
    steps = fleet.rows("step")
    assert [s["version"] for s in steps] == list(range(1, TURNS + 1))
    assert all(s["updates"] == 2 for s in steps)
    assert set(Counter(r["job"] for r in fleet.rows("up")).values()) == {1}
    assert len(fleet.rows("up")) == 2 * TURNS
    assert fleet.rows("lost") == []
