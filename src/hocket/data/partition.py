"""Who gets which rows: iid, a natural column, or Dirichlet over a label, over text clusters or over lengths.

Dirichlet draws are flwr-datasets' partitioner, or ours if all clients are to get equally many rows. Every row goes to
exactly one client; that is checked, not assumed.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np

from hocket.errors import DataError

Embedder = Callable[[list[str]], np.ndarray]


def partition(
    dataset: datasets.Dataset,
    kind: str,
    clients: int,
    seed: int,
    *,
    column: str | None = None,
    alpha: float = 0.5,
    clusters: int = 8,
    text: Callable[[Any], str] | None = None,
    embedder: Embedder | None = None,
    lengths: Sequence[int] = (),
    bins: int = 4,
    equal: bool = False,
    min_rows: int = 1,
    fill: bool = False,
) -> tuple[list[list[int]], list[str]]:
    """(row numbers of each client, a label for each row: its value in `column`, its cluster, its length, or "").

    Args:
        kind: `iid`; `dirichlet` (over `column`, concentration `alpha`); `natural` (each value of `column` is a client;
            if there are more values than clients, the rest go, largest first, to whoever has least); `clusters`;
            `lengths` (Dirichlet over `bins` of equally many rows, from short to long).
        text: a row's text, for clusters.
        embedder: texts to vectors; None takes TF-IDF with a truncated SVD.
        lengths: tokens of each row, for lengths.
        equal: Dirichlet draws give every client equally many rows.
        min_rows: fewest rows a client may get.
        fill: clients with fewer take what they lack from whoever has most, instead of an error.

    Raises:
        DataError: unknown column, too few values or rows, or a client with fewer than `min_rows`.
    """
    if not alpha > 0:
        raise DataError(f"data.alpha is {alpha}; it must be above 0")
    if clients > len(dataset):
        raise DataError(f"clients.count: {clients} clients for {len(dataset)} usable rows")
    labels = [""] * len(dataset)
    if kind in ("dirichlet", "natural"):
        if column not in dataset.column_names:
            raise DataError(f"data.column: there is no column '{column}'; there are {', '.join(dataset.column_names)}")
        labels = [str(v) for v in dataset[column]]
    if kind == "clusters":
        labels = _clusters([text(r) if text else str(r) for r in dataset], clusters, seed, embedder)
    if kind == "lengths":
        edges = length_edges(lengths, bins)
        labels = [length_bin(n, edges) for n in lengths]
    if equal and kind in ("iid", "natural"):
        raise DataError(f"data.equal: it does nothing for partition '{kind}'; leave it out")
    if kind == "natural":
        parts = _natural(labels, clients, str(column))
    elif kind == "iid":
        parts = _flower(labels, clients, seed, None)
    elif kind in ("dirichlet", "clusters", "lengths"):
        parts = _equal(labels, clients, seed, alpha) if equal else _flower(labels, clients, seed, alpha)
    else:
        raise DataError(f"data.partition: there is no '{kind}'; known: iid, dirichlet, natural, clusters, lengths")
    while fill and len(least := min(parts, key=len)) < min(min_rows, len(dataset) // clients):
        least.append(max(parts, key=len).pop())
    used = sorted(i for p in parts for i in p)
    if used != list(range(len(dataset))):
        raise DataError(f"partition '{kind}' used {len(used)} of {len(dataset)} rows, or some twice; report this")
    for client, part in enumerate(parts):
        if len(part) < min_rows:
            raise DataError(
                f"data.partition: client {client} gets {len(part)} rows, fewer than data.min_rows = {min_rows}; "
                f"raise data.alpha, lower clients.count, change the seed, or set data.fill"
            )
    return [sorted(p) for p in parts], labels


def _flower(labels: Sequence[str], clients: int, seed: int, alpha: float | None) -> list[list[int]]:
    """Row numbers through a partitioner of flwr-datasets, which takes a data set: here of numbers and labels."""
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    order = np.random.default_rng(seed).permutation(len(labels))  # the iid partitioner deals rows out as they stand
    table = datasets.Dataset.from_dict({"row": order.tolist(), "label": [labels[i] for i in order]})
    if alpha is None:
        partitioner: Any = IidPartitioner(num_partitions=clients)
    else:
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=alpha,
            min_partition_size=0,
            self_balancing=False,
            seed=seed,
        )
    partitioner.dataset = table
    try:
        return [list(partitioner.load_partition(i)["row"]) for i in range(clients)]
    except ValueError as error:
        raise DataError(f"data.alpha: the Dirichlet draw failed: {error}") from error


def _equal(labels: Sequence[str], clients: int, seed: int, alpha: float) -> list[list[int]]:
    """Dirichlet, but every client gets equally many rows (some one more than others).

    Each client draws its shares of the labels. They are scaled in turn to the rows that each client is to get and to
    those that each label has (Deming and Stephan, "On a least squares adjustment of a sampled frequency table when the
    expected marginal totals are known", 1940), and rounded down; rows that are left go to whoever lacks most.
    """
    rng, names = np.random.default_rng(seed), sorted(set(labels))
    rows = {name: rng.permutation([i for i, x in enumerate(labels) if x == name]).tolist() for name in names}
    budgets = np.array([len(labels) // clients + (c < len(labels) % clients) for c in range(clients)])
    sizes = np.array([len(rows[name]) for name in names])
    shares = rng.dirichlet([alpha] * len(names), clients) + 1e-9
    for _ in range(1000):
        shares *= (budgets / shares.sum(1))[:, None]
        shares *= sizes / shares.sum(0)
    counts = np.floor(shares).astype(int)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for c in range(clients):
        while counts[c].sum() > budgets[c]:  # the scaling had not quite come to rest
            counts[c, counts[c].argmax()] -= 1
    for k, name in enumerate(names):
        for c in range(clients):
            parts[c] += [rows[name].pop() for _ in range(counts[c, k])]
    for i in (i for name in names for i in rows[name]):
        parts[int(np.argmax(budgets - [len(p) for p in parts]))].append(i)
    return parts


def length_edges(lengths: Sequence[int], bins: int) -> list[int]:
    """The longest length of every bin but the last, so that bins hold about equally many rows."""
    ordered = sorted(lengths)
    edges = sorted({ordered[len(ordered) * b // bins - 1] for b in range(1, bins)} - {ordered[-1]})
    if not edges:
        raise DataError(f"data.bins: {bins} bins, but nearly all rows have one length, {ordered[-1]} tokens")
    return edges


def length_bin(length: int, edges: Sequence[int]) -> str:
    """The name of a length's bin; names sort as lengths do."""
    b = bisect.bisect_left(edges, length)
    words = f"up to {edges[0]}" if b == 0 else f"above {edges[-1]}" if b == len(edges) else f"to {edges[b]}"
    return f"length {b + 1:0{len(str(len(edges) + 1))}d}: {words} tokens"


def _natural(labels: Sequence[str], clients: int, column: str) -> list[list[int]]:
    counts = collections.Counter(labels)
    if len(counts) < clients:
        raise DataError(
            f"data.column: '{column}' has {len(counts)} values ({', '.join(sorted(counts)[:8])}), clients.count is "
            f"{clients}; lower clients.count to {len(counts)}"
        )
    owner: dict[str, int] = {}
    load = [0] * clients
    # one value a client in the order of their names; what is left goes, largest first, to whoever has least
    ranked = sorted(counts, key=lambda v: (-counts[v], v))
    for client, value in enumerate(sorted(ranked[:clients])):
        owner[value], load[client] = client, counts[value]
    for value in ranked[clients:]:
        client = load.index(min(load))
        owner[value], load[client] = client, load[client] + counts[value]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for i, label in enumerate(labels):
        parts[owner[label]].append(i)
    return parts


def _clusters(texts: list[str], clusters: int, seed: int, embedder: Embedder | None) -> list[str]:
    """A text cluster for each row: k-means on embeddings."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    if clusters > len(texts):
        raise DataError(f"data.clusters: {clusters} clusters for {len(texts)} rows")
    if embedder is not None:
        vectors = np.asarray(embedder(texts))
    else:
        try:
            counts = TfidfVectorizer(max_features=20_000, sublinear_tf=True, stop_words="english").fit_transform(texts)
        except ValueError as error:  # nothing but stop words
            raise DataError(f"data.partition: the texts cannot be clustered: {error}") from error
        size = min(64, counts.shape[1] - 1, len(texts) - 1)
        vectors = TruncatedSVD(size, random_state=seed).fit_transform(counts) if size > 1 else counts.toarray()
    found = MiniBatchKMeans(clusters, random_state=seed, n_init=4, batch_size=1024).fit_predict(normalize(vectors))
    return [f"cluster {c}" for c in found]


def summary(parts: Sequence[Sequence[int]], labels: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each client its name, rows, and its most frequent labels with their counts."""
    out = []
    for name, part in zip(names, parts, strict=True):
        top = collections.Counter(labels[i] for i in part if labels[i]).most_common(4)
        out.append({"client": name, "rows": len(part), "labels": ", ".join(f"{k}: {v}" for k, v in top)})
    return out
