"""How a tree becomes bytes: the codec interface, its registry and the ways to combine codecs.

A codec turns *one tensor* into named parts and back; packets, files and laziness are written once, here. Parts travel
as `tensor|part`; whatever else is needed to undo the work travels as JSON in the packet's `meta`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, BinaryIO, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket import wire
from hocket.combine import finite
from hocket.errors import WireError
from hocket.registry import Registry
from hocket.tree import Tree

Parts = dict[str, Tensor]
PLAIN = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

codec: Registry[Codec] = Registry("codec", "hocket.codecs")


@dataclass(frozen=True, config=PLAIN)
class Codec:
    """One tensor to parts and back. A subclass overrides `pack` and `unpack`; the defaults keep the tensor as it is."""

    name: ClassVar[str] = ""

    @property
    def within(self) -> tuple[Codec, ...]:
        """The codecs this one is made of."""
        return ()

    @property
    def lossless(self) -> bool:
        """Whether what arrives is what was sent, to the bit."""
        return bool(self.within) and all(c.lossless for c in self.within)

    @property
    def remembers(self) -> bool:
        """Whether it carries something over from packet to packet, in its sender's memory."""
        return any(c.remembers for c in self.within)

    @property
    def differences(self) -> bool:
        """Whether it is meant for differences only: it leaves out parts of a tensor that a whole model cannot miss."""
        return any(c.differences for c in self.within)

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        """Parts and JSON-able meta of tensor `x`; `memory` is this sender's own and may be read and written."""
        return {"": x}, None

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        """The tensor, from its parts and meta."""
        return parts[""]

    def flops(self, name: str, x: Tensor) -> float:
        """Floating point operations to encode `x`, from its shape; 0 where sending it costs as many passes over it."""
        return 0.0

    def work(self, tree: Mapping[str, Tensor]) -> float:
        """Floating point operations to encode `tree`; its tensors may be on the meta device."""
        return sum(self.flops(name, tree[name]) for name in sorted(tree))

    def encode(self, tree: Mapping[str, Tensor], memory: Tree | None = None) -> bytes:
        """A packet. `memory` (error feedback) is changed in place; stateless codecs ignore it."""
        return wire.pack(*self._packed(tree, memory))

    def write(self, file: BinaryIO, tree: Mapping[str, Tensor], memory: Tree | None = None) -> int:
        """Write the bytes of `encode` to an open file, without building them in memory; returns their number."""
        return wire.write(file, *self._packed(tree, memory))

    def size(self, tree: Mapping[str, Tensor]) -> int:
        """Bytes of `encode(tree)`, from the same code but without copying the tensors together."""
        return wire.size(*self._packed(tree, None))

    def decode(self, packet: bytes | wire.Packet) -> Decoded:
        """The tree, tensor by tensor when asked for. Raises `WireError` if the packet was made by another codec."""
        return Decoded(self, packet if isinstance(packet, wire.Packet) else wire.Packet(packet))

    def _packed(self, tree: Mapping[str, Tensor], memory: Tree | None) -> tuple[Tree, dict[str, Any]]:
        memory = {} if memory is None else memory
        out: Tree = {}
        metas = {}
        for name in sorted(tree):
            if "|" in name:
                raise WireError(f"tensor name '{name}' holds '|', which separates a tensor from its parts")
            parts, meta = self.pack(name, tree[name], memory)
            out |= {f"{name}|{suffix}" if suffix else name: t for suffix, t in parts.items()}
            if meta is not None:
                metas[name] = meta
        return out, {"codec": str(self), "tensors": metas}

    def __str__(self) -> str:
        return self.name


class Decoded(Mapping[str, Tensor]):
    """A packet seen through its codec: a read-only tree that decodes a tensor each time it is asked for."""

    def __init__(self, codec: Codec, packet: wire.Packet) -> None:
        if packet.meta.get("codec") != str(codec):
            raise WireError(f"{packet.where} was encoded with '{packet.meta.get('codec')}', expected '{codec}'")
        self.codec, self.packet = codec, packet
        self._parts: dict[str, list[str]] = {}
        for key in packet:
            self._parts.setdefault(key.partition("|")[0], []).append(key)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            raise KeyError(name)
        try:
            parts = {key.partition("|")[2]: self.packet[key] for key in self._parts[name]}
            return self.codec.unpack(parts, self.packet.meta["tensors"].get(name))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise WireError(f"{self.packet.where}: tensor '{name}' cannot be decoded: {error!r}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # a look, without decoding

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def sent_raw(meta: Mapping[str, Any]) -> int:
    """How many tensors of a packet with this `meta` their codec could not make smaller, and sent as they were."""
    tensors = meta.get("tensors")
    return sum(_raw(m) for m in tensors.values()) if isinstance(tensors, Mapping) else 0


def _raw(meta: Any, depth: int = 16) -> bool:
    """Whether a tensor's meta, or what it became in a wrapper (a chain's first parts, a rule's codec), says `raw`."""
    if isinstance(meta, Mapping) and depth:
        return "raw" in meta or _raw(meta.get(""), depth - 1)
    return isinstance(meta, list) and depth > 0 and any(_raw(m, depth - 1) for m in meta)


def build(spec: Any) -> Codec:
    """A codec from a name, a table with `name` and fields, or a codec."""
    return codec.build(spec)


def _inner(spec: Any) -> Codec:
    """A codec inside another: any but error feedback, which has one memory per tensor and so is outermost."""
    inner = build(spec)
    if isinstance(inner, Feedback):
        raise ValueError("feedback cannot be inside another codec; put it around the whole, once: feedback(chain(...))")
    return inner


Nested = Annotated[Codec, BeforeValidator(_inner)]


@codec("raw")
@dataclass(frozen=True, config=PLAIN)
class Raw(Codec):
    """Every tensor as it is."""

    lossless = True


@codec("chain")
@dataclass(frozen=True, config=PLAIN)
class Chain(Codec):
    """Each codec works on the parts of the one before: `chain(topk, int8)` quantizes the values that were kept."""

    codecs: tuple[Nested, ...] = Field(min_length=1, description="the codecs, first to last")

    @property
    def within(self) -> tuple[Codec, ...]:
        return self.codecs

    def flops(self, name: str, x: Tensor) -> float:
        parts: Parts = {"": x.to("meta")}  # shapes are enough to know what each codec hands to the next
        total = 0.0
        costly = [type(c).flops is not Codec.flops for c in self.codecs]
        for i, c in enumerate(self.codecs):
            if not any(costly[i:]):
                break
            total += sum(c.flops(name, t) for t in parts.values())
            parts = {f"{s}.{sub}": v for s, t in parts.items() for sub, v in c.pack(name, t, {})[0].items()}
        return total

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        parts: Parts = {"": x}
        metas: list[Any] = []
        for c in self.codecs:
            done: Parts = {}
            step = {}
            for suffix, t in parts.items():
                inner, meta = c.pack(name, t, memory)
                done |= {".".join(s for s in (suffix, sub) if s): v for sub, v in inner.items()}
                step[suffix] = [sorted(inner), meta]
            parts, metas = done, [*metas, step]
        return parts, metas

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        for c, step in zip(reversed(self.codecs), reversed(meta), strict=True):
            left, parts = dict(parts), {}
            for suffix, (subs, inner) in step.items():  # each part is used once: none can be made to stand for many
                parts[suffix] = c.unpack({s: left.pop(".".join(x for x in (suffix, s) if x)) for s in subs}, inner)
            if left:
                raise ValueError(f"parts {sorted(left)} belong to nothing")
        return parts[""]

    def __str__(self) -> str:
        return f"chain({','.join(map(str, self.codecs))})"


@codec("per_tensor")
@dataclass(frozen=True, config=PLAIN)
class PerTensor(Codec):
    """A codec by tensor name: the first rule whose pattern matches; an unmatched tensor is an error, not a default."""

    rules: dict[str, Nested] = Field(min_length=1, description='shell-style pattern = codec, in order; end with "*"')

    @property
    def within(self) -> tuple[Codec, ...]:
        return tuple(self.rules.values())

    def _pattern(self, name: str) -> str:
        for pattern in self.rules:
            if fnmatch.fnmatchcase(name, pattern):
                return pattern
        raise WireError(f"codec per_tensor: no rule matches tensor '{name}'; end the rules with '*'")

    def flops(self, name: str, x: Tensor) -> float:
        return self.rules[self._pattern(name)].flops(name, x)

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        pattern = self._pattern(name)
        parts, meta = self.rules[pattern].pack(name, x, memory)
        return parts, [pattern, meta]

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        return self.rules[meta[0]].unpack(parts, meta[1])

    def __str__(self) -> str:
        return f"per_tensor({','.join(f'{p}={c}' for p, c in self.rules.items())})"


@codec("feedback")
@dataclass(frozen=True, config=PLAIN)
class Feedback(Codec):
    """Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847): what a codec loses now is added to
    the next update. With e the sender's memory of this tensor: send C(x + e), then e <- x + e - C(x + e). It is
    outermost: `feedback(per_tensor(...))`.
    """

    lossless = False  # x + e makes +0 of -0

    codec: Nested = Field(description="the lossy codec whose error is carried over")

    @property
    def within(self) -> tuple[Codec, ...]:
        return (self.codec,)

    @property
    def remembers(self) -> bool:
        return True

    def flops(self, name: str, x: Tensor) -> float:
        return self.codec.flops(name, x)

    def pack(self, name: str, x: Tensor, memory: Tree) -> tuple[Parts, Any]:
        key = f"feedback/{name}"
        if not x.is_floating_point():
            return self.codec.pack(name, x, memory)
        x = x + memory[key] if key in memory else x
        parts, meta = self.codec.pack(name, x, memory)
        error = x - self.codec.unpack(parts, meta)
        if finite(error):  # one bad update must not spoil all that follow
            memory[key] = error
        else:
            memory.pop(key, None)
        return parts, meta

    def unpack(self, parts: Parts, meta: Any) -> Tensor:
        return self.codec.unpack(parts, meta)

    def __str__(self) -> str:
        return f"feedback({self.codec})"
