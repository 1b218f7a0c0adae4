"""GGUF files: read one into an ordinary float model and tokenizer that can be trained, saved and opened again."""

from __future__ import annotations

import contextlib
import io
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from hocket.errors import ModelError, need

AUTO: dict[str, Any] = {"causal": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and load reports inside the block; its settings are put back after it."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def check(path: Path) -> None:
    """Raise `ModelError` if the file does not begin as a GGUF file does, `HocketError` if the reader is missing."""
    need("gguf", "gguf")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not start with 'GGUF'")


def read_tokenizer(path: Path) -> Any:
    """The tokenizer kept inside a GGUF file.

    The SmolLM family splits every digit off before anything else; the general converter leaves that step out, which
    changes the tokens of white space in front of digits ("\\n\\n1."). It is put back here.

    Raises:
        ModelError: not a GGUF file, or it holds no usable tokenizer.
    """
    check(path)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise ModelError(f"{path}: its tokenizer cannot be read: {_first(error)}") from error
    if text_field(path, "tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    for key in ("is_local", "local_files_only", "gguf_file"):  # traces of this one call, not facts of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def read_model(path: Path, *, task: str = "causal", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """De-quantize a GGUF file into an ordinary model. Slow (tens of seconds for 100 M parameters); convert once.

    Args:
        options: passed to `from_pretrained`, for example `num_labels`.

    Returns:
        (model, loading info of transformers: missing, unexpected and mismatched names).

    Raises:
        ModelError: not a GGUF file, damaged, or of an architecture that transformers cannot map.
    """
    check(path)
    try:
        # the converter's bar ignores transformers' setting and writes to the standard error stream
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model, info = AUTO[task].from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True, **options
            )
    except Exception as error:
        raise ModelError(
            f"{path} cannot be loaded: {_first(error)} (damaged, or an architecture that "
            f"transformers {transformers.__version__} does not map)"
        ) from error
    # the weights are plain floats now; without these marks removed saving is refused
    model.hf_quantizer, model.is_quantized = None, False
    model.config.__dict__.pop("quantization_config", None)
    return model, info


def text_field(path: Path, key: str) -> str | None:
    """A text value of a GGUF file's header, or None. Searches for the key as stored, so no parse of a large header."""
    mark = key.encode() + struct.pack("<I", 8)  # 8 is the type number of text
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(mark)
        if at < 0:
            return None
        at += len(mark)
        (length,) = struct.unpack("<Q", data[at : at + 8])
        return data[at + 8 : at + 8 + length].decode("utf-8", "replace") if length < 4096 else None


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
