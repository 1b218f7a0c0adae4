"""Opening and writing models: tiny random ones, the small real one, and every kind of broken folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hocket.errors import ModelError
from hocket.models import export, load
from hocket.models.tiny import tiny, tiny_tokenizer
from hocket.tree import digest

TEXT = "the quick brown fox, 42!"


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder to be broken."""
    return export(*tiny("llama", layers=2), tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_tiny_causal_trains(arch: str) -> None:
    model, tokenizer = tiny(arch)
    x = tokenizer(["the cat sat", "on a mat"], padding=True, return_tensors="pt")
    assert tokenizer.decode(x.input_ids[0], skip_special_tokens=True) == "the cat sat"
    labels = x.input_ids.masked_fill(x.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.train()(**x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_tiny_is_keyed(arch: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = state(tiny(arch, "classification", num_labels=3)[0])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert digest(a) == digest(state(tiny(arch, "classification", num_labels=3)[0]))
    assert digest(a) != digest(state(tiny(arch, "classification", num_labels=3, seed=1)[0]))
    fewer = state(tiny(arch, "classification", num_labels=3, layers=2)[0])
    assert len(fewer) < len(a)
    assert all(torch.equal(p, a[n]) for n, p in fewer.items())
    drawn = [n for n, p in a.items() if p.ndim >= 2]
    assert len({float(a[n].detach().double().sum()) for n in drawn}) == len(drawn)  # no two weights share a draw


def test_tiny_refusals() -> None:
    for call, words in [
        (lambda: tiny("lama"), "did you mean 'llama'"),
        (lambda: tiny("bert"), "bert is an encoder"),
        (lambda: tiny("llama", "regression"), "causal, classification"),
        (lambda: tiny("llama", width=12), "multiple of 8"),
        (lambda: tiny("llama", vocab=4), "smaller than 8"),
        (lambda: load("tiny:lama"), "did you mean 'llama'"),
    ]:
        with pytest.raises(ModelError, match=words):
            call()


def test_tiny_tokenizer(tmp_path: Path) -> None:
    for arch, ends in (("llama", (1, 0)), ("gpt2", (0, 0)), ("bert", (1, 1))):
        small = tiny_tokenizer(64, arch)
        assert len(small) == 64
        ids = small("Abc 1\n").input_ids
        assert len(ids) == 6 + sum(ends)
        assert small.unk_token_id not in ids
        assert small.decode(ids, skip_special_tokens=True) == "abc 1\n"
    large = tiny_tokenizer(128)
    assert large.decode(large("Abc {}~").input_ids, skip_special_tokens=True) == "Abc {}~"
    large.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)("Abc").input_ids == large("Abc").input_ids


def test_load_real_model(stories: Path) -> None:
    a = load(stories)
    assert a.source == str(stories)
    assert (a.new, a.unused) == ((), ())
    assert not a.model.training
    assert a.model.config.use_cache is False
    assert a.model.config.pad_token_id == a.tokenizer.pad_token_id == 2
    assert sum(p.numel() for p in a.model.parameters()) == 260_032
    x = a.tokenizer("Once upon a time", return_tensors="pt")
    out = a.model.generate(**x, max_new_tokens=12, do_sample=False)
    assert "there was a little girl" in a.tokenizer.decode(out[0], skip_special_tokens=True)


def test_classification_head_is_keyed_and_pools_the_right_token(stories: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = load(stories, task="classification", num_labels=3, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    b = load(stories, task="classification", num_labels=3, seed=5)
    c = load(stories, task="classification", num_labels=3, seed=6)
    assert a.new == ("score.weight",)
    assert digest(state(a.model)) == digest(state(b.model))
    assert not torch.equal(a.model.score.weight, c.model.score.weight)
    assert a.model.score.weight.shape == (3, 64)
    # the file's part is the file's, not a new draw
    stored = load_file(stories / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(a.model.model.embed_tokens.weight, stored)
    texts = ["Once upon a time there was a cat", "A dog"]
    both = a.tokenizer(texts, padding=True, return_tensors="pt")
    assert both.attention_mask[1, -1] == 0  # padded on the right
    with torch.no_grad():
        alone = a.model(**a.tokenizer(texts[1], return_tensors="pt")).logits[0]
        assert torch.allclose(a.model(**both).logits[1], alone, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_encoder_and_decoder_folders_classify(arch: str, tmp_path: Path) -> None:
    task = "classification" if arch == "bert" else "causal"
    path = export(*tiny(arch, task), tmp_path / "m")
    a = load(path, task="classification")
    assert a.new == {"llama": ("score.weight",), "gpt2": ("score.weight",), "bert": ()}[arch]
    if arch == "llama":
        assert a.unused == ("lm_head.weight",)
    x = a.tokenizer(["abc", "a longer one"], padding=True, return_tensors="pt")
    assert a.model(**x).logits.shape == (2, 2)


def test_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    x = tiny_tokenizer()(TEXT, return_tensors="pt")
    grads = []
    for on in (False, True):
        model = load(folder, gradient_checkpointing=on).model.train()
        calls: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        model(**x, labels=x.input_ids).loss.backward()
        assert len(calls) == (2 if on else 1)  # the second is the recomputation
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert digest(grads[0]) == digest(grads[1])


def test_attention_and_dtype_are_passed_on(folder: Path) -> None:
    for source in (folder, "tiny:llama"):
        a = load(source, attn="eager", dtype=torch.bfloat16)
        assert a.model.config._attn_implementation == "eager"
        assert {p.dtype for p in a.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_export_opens_again(arch: str, tmp_path: Path) -> None:
    model, tokenizer = tiny(arch)
    out = export(model, tokenizer, tmp_path / "deep" / "out")
    assert model.config.use_cache is False  # put back
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert digest(state(again)) == digest(state(model))
    assert AutoTokenizer.from_pretrained(out)(TEXT).input_ids == tokenizer(TEXT).input_ids
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (arch == "gpt2")
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) != tied
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (out / "config.json").stat().st_mode & 0o777


def test_export_of_a_tied_real_model(stories: Path, tmp_path: Path) -> None:
    a = load(stories)
    with torch.no_grad():
        a.model.get_input_embeddings().weight.add_(1)
    b = load(export(a.model, a.tokenizer, tmp_path / "out"))
    assert digest(state(a.model)) == digest(state(b.model))
    assert b.model.get_output_embeddings().weight is b.model.get_input_embeddings().weight


def test_export_refusals(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", layers=1)
    out = export(model, tokenizer, tmp_path / "out")
    with pytest.raises(ModelError, match="already there"):
        export(model, tokenizer, out)
    (out / "old.txt").write_text("")
    export(model, tokenizer, out, overwrite=True)
    assert not (out / "old.txt").exists()
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge the adapters first"):
        export(adapted, tokenizer, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def break_config(f: Path) -> None:
    (f / "config.json").unlink()


def break_adapter(f: Path) -> None:
    break_config(f)
    (f / "adapter_config.json").write_text("{}")


def break_weights(f: Path) -> None:
    (f / "model.safetensors").unlink()


def break_pickle(f: Path) -> None:
    (f / "model.safetensors").rename(f / "pytorch_model.bin")


def break_tokenizer(f: Path) -> None:
    for p in f.glob("token*"):
        p.unlink()


def break_cut(f: Path) -> None:
    p = f / "model.safetensors"
    p.write_bytes(p.read_bytes()[:-100])


def break_missing(f: Path) -> None:
    p = f / "model.safetensors"
    tensors = load_file(p)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, p, metadata={"format": "pt"})


def break_layers(f: Path) -> None:
    edit(f / "config.json", num_hidden_layers=1)


def break_shape(f: Path) -> None:
    edit(f / "config.json", intermediate_size=80)


def break_vocab(f: Path) -> None:
    tiny_tokenizer(100).save_pretrained(f)


def break_json(f: Path) -> None:
    (f / "config.json").write_text("{")


def break_kind(f: Path) -> None:
    edit(f / "config.json", model_type="lllama", architectures=...)


def break_shard(f: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (f / "model.safetensors.index.json").write_text(json.dumps(index))
    (f / "model.safetensors").rename(f / "model-1.safetensors")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (break_config, r"there is no config\.json"),
        (break_adapter, "give its base model"),
        (break_weights, "there are no weights"),
        (break_pickle, "is a pickle"),
        (break_tokenizer, "there is no tokenizer"),
        (break_cut, "damaged or cut short"),
        (break_missing, r"1 weights .* not in the file, first 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (break_layers, "weights of layers that the config does not have"),
        (break_shape, "do not fit the config"),
        (break_vocab, "ids up to 99, the model 64 rows"),
        (break_json, "cannot be opened"),
        (break_kind, "cannot be opened"),
        (break_shard, "1 of 2 weight files are missing"),
    ],
)
def test_broken_folders(folder: Path, harm, words: str) -> None:
    load(folder)
    harm(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_wrong_number_of_labels(tmp_path: Path) -> None:
    path = export(*tiny("bert", "classification", num_labels=2), tmp_path / "m")
    with pytest.raises(ModelError, match="is num_labels right"):
        load(path, task="classification", num_labels=3)
    with pytest.raises(ModelError, match="at least 1"):
        load(path, task="classification", num_labels=0)
    with pytest.raises(ModelError, match="causal, classification"):
        load(path, task="tagging")


def test_encoder_does_not_generate(tmp_path: Path) -> None:
    path = export(*tiny("bert", "classification"), tmp_path / "m")
    with pytest.raises(ModelError, match="bert is an encoder, use task 'classification'"):
        load(path)


def test_hub_without_network() -> None:
    with pytest.raises(ModelError, match="nobody-here/no-such-model cannot be had from the model hub.*no network"):
        load("nobody-here/no-such-model")


def test_bad_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(path)
    path.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\x00" * 9)
    with pytest.raises(ModelError, match="cannot be"):
        load(path)


@pytest.mark.parametrize(("present", "chosen"), [(("eos_token", "unk_token"), "</s>"), (("unk_token",), "<unk>")])
def test_padding_falls_back(folder: Path, present: tuple[str, ...], chosen: str) -> None:
    config = folder / "tokenizer_config.json"
    names = ("pad_token", "eos_token", "unk_token", "bos_token")
    edit(config, **{n: ... for n in names if n not in present})
    a = load(folder)
    assert a.tokenizer.pad_token == chosen
    assert a.model.config.pad_token_id == a.tokenizer.pad_token_id
    assert a.model.get_input_embeddings().weight.shape[0] == 64
    edit(config, **dict.fromkeys(names, ...))
    with pytest.raises(ModelError, match="no padding"):
        load(folder)


def test_load_is_quiet(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    load(folder, task="classification")
    assert capfd.readouterr() == ("", "")


def test_local_copy_is_what_is_loaded(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tensors = {k: v + 1 for k, v in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert digest(state(load(folder).model)) != digest(state(load(other).model))
