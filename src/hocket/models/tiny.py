"""Tiny random models for tests and smoke runs (`model = "tiny:llama"`): no download, every weight keyed."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from hocket.errors import ModelError, nearest
from hocket.models.gguf import AUTO
from hocket.tree import generator

ARCHITECTURES = ("bert", "gpt2", "llama")
LENGTH = 512
"""Longest sequence in tokens (characters)."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CHARACTERS = " \nabcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()+-*/=_<>[]#@{}$%&|\\^~`\tABCDEFGHIJKLMNOPQRSTUVWXYZ"


def tiny_tokenizer(vocab: int = 64, arch: str = "llama") -> PreTrainedTokenizerFast:
    """A tokenizer of single characters; ids 0 to 3 are padding, start, end and unknown.

    Args:
        vocab: size of the vocabulary, at least 8; characters beyond it are unknown. Capitals count as small letters
            where they do not fit (fewer than 101). Larger than 101 leaves ids unused.
        arch: "llama" puts a start token in front, "bert" start and end around, "gpt2" adds nothing.
    """
    if vocab < 8:
        raise ModelError(f"tiny: vocab {vocab} is smaller than 8")
    letters = [*_SPECIAL, *_CHARACTERS][:vocab]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    if "Z" not in letters:
        inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    pair = [("<s>", 1), ("</s>", 2)]
    if arch == "llama":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=pair)
    elif arch == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=pair
        )
    extra = {"cls_token": "<s>", "sep_token": "</s>"} if arch == "bert" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
        **extra,
    )


def tiny(
    arch: str,
    task: str = "causal",
    seed: int = 0,
    vocab: int = 64,
    layers: int = 4,
    width: int = 32,
    num_labels: int = 2,
) -> tuple[Any, PreTrainedTokenizerFast]:
    """A random model and its tokenizer: float32, eval mode, no dropout; the same bits for the same arguments.

    Each weight is drawn from a generator keyed by (seed, its name), so layers do not depend on how many there are.

    Args:
        arch: "llama" (rotary, grouped heads, untied head), "gpt2" (Conv1D, tied head) or "bert" (encoder).
        task: "causal" or "classification"; bert only classifies.
        width: hidden size, a multiple of 4 heads and even per head, so of 8.

    Raises:
        ModelError: unknown architecture or task, or a width that is not a multiple of 8.
    """
    if arch not in ARCHITECTURES:
        raise ModelError(f"tiny: there is no '{arch}'{nearest(arch, ARCHITECTURES)}")
    if task not in AUTO:
        raise ModelError(f"task '{task}' is not one of causal, classification")
    if arch == "bert" and task == "causal":
        raise ModelError("tiny: bert is an encoder and does not generate; use task 'classification', or llama or gpt2")
    if width % 8:
        raise ModelError(f"tiny: width {width} is not a multiple of 8")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common: dict[str, Any] = {"vocab_size": vocab, "num_labels": num_labels, **ids}
    config: Any
    if arch == "gpt2":
        off: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=LENGTH, **off, **common)
    else:
        common |= {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        common |= {"num_attention_heads": 4, "max_position_embeddings": LENGTH}
        if arch == "llama":
            config = LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **common)
        else:
            config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common)
    with torch.random.fork_rng(devices=[]):  # building draws from the global generator; leave that as it was
        model = AUTO[task].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            keyed_fill(p, name, 0.15, seed, "tiny")
    model.config.use_cache = False
    return model.eval(), tiny_tokenizer(vocab, arch)


def keyed_fill(p: torch.Tensor, name: str, std: float, *keys: int | str) -> None:
    """Fill a weight in place: normal of deviation `std` if it has rows, zeros for a bias, ones for a norm's scale.

    The draw is keyed by `keys` and `name`, in float32 on the CPU.
    """
    if p.ndim >= 2:
        p.copy_(torch.randn(p.shape, generator=generator(*keys, name)) * std)
    else:
        p.fill_(0.0 if name.endswith("bias") else 1.0)
