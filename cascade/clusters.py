"""Kinds of failed tasks: k-means over the base's own embeddings, named by what sets each kind apart."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler, normalize

from cascade.config import Clusters
from cascade.tasks import Example, Task

MOST_KINDS = 12
SMALLEST_KIND = 8
"""With fewer tasks than twice this there is one kind."""
_COMPONENTS = 24
_SAMPLE = 1500
_WORDS = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """One cluster of failed tasks.

    Attributes:
        number: 0 is the largest.
        label: its commonest category, and the words that are common in it and rare elsewhere.
    """

    number: int
    label: str


def cluster(vectors: NDArray[np.float32], settings: Clusters, seed: int) -> list[int]:
    """Cluster numbers of vectors, the largest cluster first.

    Hidden states of language models share a large common part, which would hide what sets texts apart: every
    dimension is standardised, the first principal components are kept and their length is set to one.

    Args:
        vectors: of shape (tasks, dimensions).
        settings: how many clusters; null: the number of best silhouette up to `MOST_KINDS`.
    """
    count = len(vectors)
    most = count // SMALLEST_KIND
    if most < 2 or not np.ptp(vectors, axis=0).any():
        return [0] * count
    points = reduce(vectors, seed)
    if settings.count is not None:
        candidates = [min(settings.count, count)]
    else:
        candidates = list(range(2, min(MOST_KINDS, most) + 1))
    labelled = {k: KMeans(k, n_init=4, random_state=seed).fit_predict(points) for k in candidates}
    best = max(labelled, key=lambda k: _silhouette(points, labelled[k], seed)) if len(labelled) > 1 else candidates[0]
    return _by_size([int(label) for label in labelled[best]])


def reduce(vectors: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Vectors made comparable: shape (tasks, at most 24), rows of length one."""
    scaled = StandardScaler().fit_transform(vectors)
    components = min(_COMPONENTS, *vectors.shape)
    reduced: NDArray[np.float32] = normalize(PCA(components, random_state=seed).fit_transform(scaled))
    return reduced


def _silhouette(points: NDArray[np.float32], labels: NDArray[np.int32], seed: int) -> float:
    if len(set(labels.tolist())) < 2:
        return -1.0
    size = _SAMPLE if len(points) > _SAMPLE else None
    return float(silhouette_score(points, labels, sample_size=size, random_state=seed))


def _by_size(labels: Sequence[int]) -> list[int]:
    order = {label: place for place, (label, _) in enumerate(Counter(labels).most_common())}
    return [order[label] for label in labels]


def name_kinds(tasks: Sequence[Task], numbers: Sequence[int]) -> list[Kind]:
    """A name for every cluster: its commonest category with its share, and its most telling words."""
    members: dict[int, list[Task]] = defaultdict(list)
    for task, number in zip(tasks, numbers, strict=True):
        members[number].append(task)
    words = _telling_words([[t.prompt for t in members[n]] for n in sorted(members)])
    return [Kind(n, _label(members[n], words[place])) for place, n in enumerate(sorted(members))]


def _label(tasks: Sequence[Task], words: Sequence[str]) -> str:
    category, count = Counter(t.category or t.benchmark for t in tasks).most_common(1)[0]
    share = count / len(tasks)
    name = category if share > 0.995 else f"{share:.0%} {category}"
    return f"{name}: {', '.join(words)}" if words else name


def _telling_words(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Per group the words of highest TF-IDF, each group taken as one text."""
    vectorizer = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{3,}\b", sublinear_tf=True)
    try:
        matrix = vectorizer.fit_transform(["\n".join(group) for group in groups]).toarray()
    except ValueError:  # no words at all: sums, symbols
        return [[] for _ in groups]
    names = vectorizer.get_feature_names_out()
    return [[str(names[i]) for i in np.argsort(-row)[:_WORDS] if row[i] > 0] for row in matrix]


def cap(examples: Sequence[Example], cluster_of: Mapping[str, int], most: int, seed: int) -> list[Example]:
    """At most `most` examples of each cluster, drawn by chance that the seed decides; the rest as they were.

    Examples of tasks that are in no cluster (the student's own, replayed) are all kept.
    """
    members: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        if example.task_id in cluster_of:
            members[cluster_of[example.task_id]].append(example)
    dropped: set[str] = set()
    for group in members.values():
        drawn = sorted(group, key=lambda e: hashlib.sha256(f"{seed}:{e.task_id}".encode()).digest())
        dropped |= {e.task_id for e in drawn[most:]}
    return [e for e in examples if e.task_id not in dropped or e.task_id not in cluster_of]
