"""What methods share whose server tells news that everybody applies: factors, scalars of random vectors, differences.

Who holds a version makes the next one of it by applying the next version's news, in the same order and to the same bits
as the server, so only news travel down. A client that missed versions gets the news of each, or the tensors they stand
for where that is less; the server keeps only news that could still be sent, so at most one dense copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic.dataclasses import dataclass
from torch import Tensor

from hocket.methods.base import PLAIN, Client, Method, State
from hocket.tree import Tree, nbytes


@dataclass(frozen=True, config=PLAIN)
class Replay(Method):
    """A method that sends what changed a version, not the tensors that changed."""

    def covers(self, name: str) -> bool:
        """Whether news stand for changes of this tensor; others travel whole when they changed."""
        raise TypeError(f"{type(self).__name__} must define covers()")

    def apply(self, held: Tree, news: Mapping[str, Tensor]) -> Tree:
        """The next version of what is held; `held` is not written into."""
        raise TypeError(f"{type(self).__name__} must define apply()")

    def init(self, params: Tree, seed: int) -> State:
        return super().init(params, seed) | {"version": 0, "news": {}, "last": {}}

    def told(self, before: State, after: State, news: Tree) -> State:
        """`after` with `news` applied, as all that hold `before` will apply them."""
        version = before["version"] + 1
        params = self.apply(after["params"], news)
        whole = nbytes({k: v for k, v in params.items() if self.covers(k)})
        kept = _cheap(before["news"] | {str(version): news}, whole)
        return after | {"params": params, "version": version, "last": news, "news": kept}

    def untold(self, before: State, after: State) -> State:
        """`after` as a version that no news lead to: clients are sent its tensors."""
        return after | {"version": before["version"] + 1, "last": {}, "news": {}}

    def ship(self, state: State, client: Client, version: int, since: int, changed: Mapping[str, int]) -> Tree:
        rest = super().ship(state, client, version, since, changed)
        missed = [str(v) for v in range(max(since, 0) + 1, version + 1)]
        if since < 0 or any(v not in state["news"] for v in missed):
            return rest
        news = {f"{v}/{k}": x for v in missed for k, x in state["news"][v].items()}
        whole = {k: v for k, v in rest.items() if self.covers(k)}
        return rest if nbytes(whole) <= nbytes(news) else without(rest, whole) | news

    def load(self, held: Tree, payload: Mapping[str, Tensor]) -> Tree:
        out = held | {k: payload[k] for k in payload if "/" not in k}
        by_version: dict[int, Tree] = {}
        for key in (k for k in payload if "/" in k):
            version, _, name = key.partition("/")
            by_version.setdefault(int(version), {})[name] = payload[key]
        for step in sorted(by_version):
            out = self.apply(out, by_version[step])
        return out


def without(tree: Mapping[str, Tensor], names: Iterable[str]) -> Tree:
    """What is left of `tree`; only that is decoded."""
    gone = set(names)
    return {k: tree[k] for k in tree if k not in gone}


def _cheap(news: dict[str, Tree], whole: int) -> dict[str, Tree]:
    """The newest news, as far back as sending all of them costs less than `whole` bytes of tensors."""
    keep: dict[str, Tree] = {}
    for version in sorted(news, key=int, reverse=True):
        whole -= nbytes(news[version])
        if whole < 0:
            break
        keep[version] = news[version]
    return dict(reversed(keep.items()))
