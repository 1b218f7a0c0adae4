"""The one registry: names to classes for methods, schedules and codecs, and typed construction from plain data.

An unknown name or field is an error that lists the nearest ones; nothing falls back silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from hocket.errors import RecipeError, nearest

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Named classes of one kind.

    Args:
        kind: what the entries are, for error messages ("method").
        home: a module whose import registers the entries that ship, so that look-ups work whatever was imported.
    """

    every: ClassVar[dict[str, Registry[Any]]] = {}

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, type[T]] = {}
        Registry.every[kind] = self

    def __call__(self, name: str) -> Callable[[C], C]:
        """Class decorator that registers under `name`; a second class of that name is refused."""

        def add(cls: C) -> C:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            if name != name.lower():
                raise ValueError(f"{self.kind} '{name}' must be lower case")
            self._entries[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        __import__(self.home)
        return sorted(self._entries)

    def get(self, name: str, path: str = "") -> type[T]:
        """The class called `name`. Raises `RecipeError` with the nearest names if there is none."""
        if name not in self.names():
            raise RecipeError(f"{path or self.kind}: there is no '{name}'{nearest(name, self._entries)}")
        return self._entries[name]

    def build(self, spec: str | Mapping[str, Any] | T, path: str = "") -> T:
        """An instance from a name, or from a table holding `name` and fields; an instance passes through.

        Raises:
            RecipeError: unknown name, unknown field or wrong type; the message starts with the field's path.
        """
        path = path or self.kind
        if not isinstance(spec, str | Mapping):
            return spec
        fields = {"name": spec} if isinstance(spec, str) else dict(spec)
        if not isinstance(fields.get("name"), str):
            raise RecipeError(f"{path}.name: missing; known: {', '.join(self.names())}")
        cls = self.get(fields.pop("name"), path)
        known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        for key in fields:
            if key not in known:
                raise RecipeError(f"{path}.{key}: {self.kind} '{cls.name}' has no such field{nearest(key, known)}")  # type: ignore[attr-defined]
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            raise RecipeError(explain(error, path)) from error


def explain(error: ValidationError, path: str = "") -> str:
    """A pydantic error as lines of `field.path: what is wrong (value)`."""
    lines = []
    for e in error.errors():
        where = ".".join([path, *(str(x) for x in e["loc"])]).strip(".")
        where = f"{where}: " if where else ""
        reason = e["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        shown = "" if isinstance(e["input"], dict) else f" (got {e['input']!r})"
        lines.append(f"{where}{reason}{shown}")
    return "\n".join(lines)


def fields(cls: type) -> list[tuple[str, str, Any, str]]:
    """(name, type, default, help) of every hyper-parameter of a registered class, for help texts and docs."""
    from pydantic.fields import FieldInfo

    rows = []
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        info: FieldInfo | None = getattr(cls, "__pydantic_fields__", {}).get(f.name)
        default = info.get_default(call_default_factory=True) if info else f.default
        rows.append((f.name, str(f.type), default, (info.description if info else "") or ""))
    return rows
