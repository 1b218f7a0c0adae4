"""Open a model and its tokenizer from a known name, a hub id, a folder or a GGUF file, and write one out again."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hocket.errors import ModelError
from hocket.models import files, gguf
from hocket.models.hub import resolve, snapshot
from hocket.models.tiny import keyed_fill, tiny

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "tekken.json",
)


@dataclass(frozen=True)
class Loaded:
    """A model ready to train or evaluate.

    Args:
        model: a transformers model in eval mode; its training use of the key-value cache is off.
        tokenizer: pads on the right with a token that the model knows.
        source: what was asked for, resolved: folder, file, hub id or `tiny:ARCH`.
        new: names of weights that were not in the source and were drawn from the seed (a new classification head).
        unused: names in the source that the model has no place for (the language head, if it classifies).
    """

    model: Any
    tokenizer: Any
    source: str
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def load(
    source: str | Path,
    *,
    task: str = "causal",
    num_labels: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    gradient_checkpointing: bool = False,
    attn: str | None = None,
    seed: int = 0,
) -> Loaded:
    """Open a model and its tokenizer. Global random state is not touched; the same arguments give the same bits.

    Files in bfloat16 are widened to `dtype`, exactly. Dropout is left as the model's config has it, and does nothing
    until `model.train()`; the same goes for gradient checkpointing. Weights are read from safetensors or GGUF only.

    Args:
        source: a known name (pulled if missing), a hub id, a folder, a `.gguf` file, or `tiny:llama|gpt2|bert`.
        task: "causal" or "classification".
        num_labels: classes, for classification.
        gradient_checkpointing: recompute activations in the backward pass (slower, less memory).
        attn: attention implementation of transformers ("sdpa", "eager", "flash_attention_2"); None lets it choose.
        seed: key of the draw of a new classification head.

    Raises:
        ModelError: the source is missing, incomplete, damaged, or does not fit the task.
        HocketError: the file needs an extra that is not installed.
    """
    if task not in gguf.AUTO:
        raise ModelError(f"task '{task}' is not one of causal, classification")
    if num_labels < 1:
        raise ModelError(f"num_labels is {num_labels}; it must be at least 1")
    at = resolve(source)
    if isinstance(at, str) and at.startswith("tiny:"):
        model, tokenizer = tiny(at.removeprefix("tiny:"), task, seed, num_labels=num_labels)
        if attn:
            model.set_attn_implementation(attn)
        return _ready(model.to(dtype), tokenizer, device, gradient_checkpointing, Loaded(None, None, at))
    options: dict[str, Any] = {"num_labels": num_labels} if task == "classification" else {}
    if attn:
        options["attn_implementation"] = attn
    with torch.random.fork_rng(devices=[]):  # new heads are first drawn from the global generator
        # a hub id is fetched as a whole first: one look at the network, and the same checks as for a folder
        where = at if isinstance(at, Path) else snapshot(at)
        if where.is_file():
            tokenizer = gguf.read_tokenizer(where)
            model, info = gguf.read_model(where, task=task, dtype=dtype, **options)
        else:
            check_folder(where)
            tokenizer = _tokenizer(where)
            model, info = _model(where, task, dtype, options)
    new = _complete(model, info, task, seed, where)
    unused = tuple(sorted(info["unexpected_keys"]))
    _no_lost_layers(model, unused, where)
    return _ready(model, tokenizer, device, gradient_checkpointing, Loaded(None, None, str(at), new, unused))


def export(model: Any, tokenizer: Any, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a whole model (not an adapter) as a folder that `from_pretrained` opens: all there, or not there at all.

    Args:
        model: a transformers model; tied weights are written once. Its dtype is kept.
        out: the folder to make.
        overwrite: replace `out` if it holds something.

    Raises:
        ModelError: `out` is in use, the disk is full, or the model still has unmerged adapters in it.
    """
    out = Path(out)
    odd = next((n for n, _ in model.named_parameters() if ".base_layer." in n or "lora_" in n), None)
    if odd or not hasattr(model, "config"):
        raise ModelError(f"only plain models are exported; merge the adapters first ('{odd or type(model).__name__}')")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise ModelError(f"{out} is already there; choose another folder or ask for overwriting")
    work = out.with_name(f".{out.name}.{os.getpid()}.part")
    cached = getattr(model.config, "use_cache", None)
    with files.disk(out.parent):
        try:
            work.mkdir(parents=True)
            if cached is not None:
                model.config.use_cache = True  # off only for training; whoever opens the copy wants to generate
            with gguf.quiet():
                model.save_pretrained(work)
                tokenizer.save_pretrained(work)
            files.publish(work, out)
        finally:
            if cached is not None:
                model.config.use_cache = cached
            files.remove(work)
    return out


def check_folder(folder: Path) -> None:
    """Raise `ModelError` unless the folder has a config, all its safetensors files, and some tokenizer."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = " (it holds a PEFT adapter: give its base model, and this as model.adapter)" if adapter else ""
        raise ModelError(f"{folder}: there is no config.json{hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text(encoding="utf-8"))))
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing or not shards:
            raise ModelError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing, first {missing[:1]}")
    elif not (folder / "model.safetensors").is_file():
        pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        hint = f"; {pickled[0]} is a pickle, which is not opened: save it as safetensors" if pickled else ""
        raise ModelError(f"{folder}: there are no weights (model.safetensors){hint}")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{folder}: there is no tokenizer (tokenizer.json, tokenizer.model, vocab.txt, ...)")


def _tokenizer(at: Path) -> Any:
    try:
        with gguf.quiet():
            return AutoTokenizer.from_pretrained(str(at), trust_remote_code=False)
    except Exception as error:
        raise _cannot("tokenizer", at, error) from error


def _model(at: Path, task: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        with gguf.quiet():
            model, info = gguf.AUTO[task].from_pretrained(
                str(at), dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
            )
    except Exception as error:
        raise _cannot("model", at, error) from error
    if odd := sorted(map(str, info.get("mismatched_keys") or ())):
        raise ModelError(f"{at}: weights have other shapes than the config says, first {odd[0]}")
    return model, info


def _cannot(what: str, at: Path, error: Exception) -> ModelError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    message = f"{at}: the {what} cannot be opened: {type(error).__name__}: {first}"
    if "safetensor" in type(error).__name__.lower() or "deserializ" in str(error):
        message += " (the weight file is damaged or cut short)"
    elif "mismatch" in str(error):
        message += " (the weights do not fit the config; for classification, is num_labels right?)"
    return ModelError(message)


def _complete(model: Any, info: dict[str, Any], task: str, seed: int, at: Path) -> tuple[str, ...]:
    """Draw a new classification head; any other weight that the source lacks is an error. Returns the new names."""
    missing = sorted(info["missing_keys"])
    prefix = f"{model.base_model_prefix}."
    new = [n for n in missing if task == "classification" and (not n.startswith(prefix) or ".pooler." in n)]
    if lost := [n for n in missing if n not in new]:
        kind = model.config.model_type
        encoder = kind in ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet")
        hint = f"; {kind} is an encoder, use task 'classification'" if encoder and task == "causal" else ""
        raise ModelError(f"{at}: {len(lost)} weights of the model are not in the file, first '{lost[0]}'{hint}")
    weights = dict(model.named_parameters())
    std = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    with torch.no_grad():
        for name in new:
            keyed_fill(weights[name], name, std, seed, "head")
    return tuple(new)


def _no_lost_layers(model: Any, unused: tuple[str, ...], at: Path) -> None:
    """A config that says fewer layers than the file holds would drop weights without a word; refuse that."""

    def shape(name: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", name)

    places = {shape(n) for n, _ in model.named_parameters() if shape(n) != n}
    places |= {p.removeprefix(f"{model.base_model_prefix}.") for p in places}
    if lost := [n for n in unused if shape(n) in places]:
        raise ModelError(f"{at}: the file holds {len(lost)} weights of layers that the config does not have: {lost[0]}")


def _ready(model: Any, tokenizer: Any, device: str | torch.device, checkpointing: bool, facts: Loaded) -> Loaded:
    at = facts.source
    text = model.config.get_text_config()
    if tokenizer.pad_token_id is None:  # an existing token, so that the embedding keeps its size
        for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
            if token is not None:
                tokenizer.pad_token = token
                break
        else:
            raise ModelError(f"{at}: the tokenizer has no padding, end, unknown or start token; name one in its config")
    tokenizer.padding_side = "right"
    highest = max(tokenizer.get_vocab().values(), default=-1)
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ModelError(f"{at}: the tokenizer has ids up to {highest}, the model {rows} rows; they are no pair")
    # classification with a decoder reads the last token that is not this one, and transformers wants it on both configs
    model.config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = text.use_cache = False
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"{at}: {type(model).__name__} has no gradient checkpointing")
        # renamed in later releases of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Loaded(model.to(device).eval(), tokenizer, at, facts.new, facts.unused)
