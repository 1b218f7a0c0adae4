"""Public architectures as configurations without weights (`shape:llama-3-8b`), to plan what no small machine can run.

Only what decides the shapes of tensors is here, as the models' public configuration files give it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from hocket.errors import ModelError, nearest

PREFIX = "shape:"

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "llama-3.2-3b": {
        **_LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
}  # fmt: skip


def config(source: str) -> Any:
    """The configuration that `shape:NAME` stands for. Raises `ModelError` with the nearest names."""
    name = source.removeprefix(PREFIX)
    if name not in SHAPES:
        raise ModelError(f"model.source '{source}': there is no shape '{name}'{nearest(name, SHAPES)}")
    return AutoConfig.for_model(**SHAPES[name])
