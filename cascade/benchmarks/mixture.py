"""The tasks of a domain: a part's sources mixed by weight, with nothing shared between what is learned and measured.

What a validation, test or general task asks is dropped from the training split, and what a test or general task asks
from the validation split, by normalised prompt; by the whole chat where chats of one set share their last message. In a
part that is limited by a count the same conversation appears once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from cascade import benchmarks
from cascade.benchmarks.normalise import Questions, asks_the_same, conversation_key
from cascade.benchmarks.sources import local_files
from cascade.config import Config, Part, Tasks, TaskSet, TaskSource
from cascade.errors import ConfigError, DataError
from cascade.tasks import Split, Task

_PROTECTED: dict[Part, tuple[Part, ...]] = {
    "train": ("validation", "test", "general"),
    "validation": ("test", "general"),
}
_ROUNDS = 8
"""Times a source is asked for more when some of its tasks had to be dropped."""


def load_tasks(config: Config, part: Part) -> list[Task]:
    """The tasks of one part, in an order that depends on the config and its seed alone.

    Args:
        config: its `tasks`, `domain` and `seed` decide the result.
        part: "train", "validation", "test" or "general" (test splits of other benchmarks).

    Returns:
        Exactly `count` tasks, by weight from the sources (another fills up where one runs out); all of them if the
        count is null; none of a general part that the config does not have. Ids are unique.

    Raises:
        DataError: all sources together have fewer tasks than asked (says how many), or two tasks have the same id.
        ConfigError: an option of a source is wrong, or there are no files where it says so.
    """
    return list(_load(config.tasks.model_dump_json(), config.domain, config.seed, part))


def _check_paths(tasks: Tasks, part: Part) -> None:
    """See that the files are there of all sources that loading a part reads, before any of it is downloaded.

    Raises:
        ConfigError: some are not; names the key.
    """
    read = {name: tasks.part(name) for name in (part, *_PROTECTED.get(part, ()))}
    sources = [
        (f"tasks.{name}.sources.{n}", s) for name, found in read.items() if found for n, s in enumerate(found.sources)
    ]
    if part == "train":  # nothing that is trained on may overlap these
        sources += [(f"tasks.protect.{n}", s) for n, s in enumerate(tasks.protect or ())]
    for key, source in sources:
        path = source.options.get("path")
        try:
            if isinstance(path, str):
                local_files(path)
        except DataError as error:
            raise ConfigError(f"{key}.options.path: {error}") from None


@lru_cache(maxsize=8)
def _load(tasks_json: str, domain: str, seed: int, part: Part) -> tuple[Task, ...]:
    asked = Tasks.model_validate_json(tasks_json)
    _check_paths(asked, part)
    task_set = asked.part(part)
    if task_set is None:
        return ()
    split: Split = "test" if part == "general" else part
    others = {other: _load(tasks_json, domain, seed, other) for other in _PROTECTED.get(part, ())}
    forbidden = Questions(task for tasks in others.values() for task in tasks)
    feeds = [_Feed(source, split, domain, seed, forbidden) for source in task_set.sources]
    tasks = _everything(feeds) if task_set.count is None else _mix(feeds, task_set.count)
    left_out = _left_out([f"tasks.{other}" for other in others if others[other]], feeds)
    if task_set.count is not None and len(tasks) < task_set.count:
        raise DataError(_too_few(task_set, part, len(tasks), left_out))
    if not tasks:
        raise DataError(f"tasks.{part}: its sources have no task left: {left_out}")
    _refuse_repeated_ids(tasks)
    return tuple(tasks)


class _Feed:
    """One source, read in its own order, without what other splits hold."""

    def __init__(self, source: TaskSource, split: Split, domain: str, seed: int, forbidden: Questions) -> None:
        self.source, self.split, self.domain, self.seed, self.forbidden = source, split, domain, seed, forbidden
        self.loaded = self.shared = self.repeated = 0

    def first(self, count: int | None, *, unique: bool) -> list[Task]:
        """Up to `count` usable tasks, asking the benchmark for more while usable ones are missing."""
        asked = count
        for _ in range(_ROUNDS):
            loaded = self._load(asked)
            kept = self._usable(loaded, unique)
            exhausted = asked is None or count is None or len(loaded) < asked
            if exhausted or len(kept) >= count:  # type: ignore[operator]
                break
            asked = 2 * asked  # type: ignore[operator]
        return kept if count is None else kept[:count]

    def _load(self, count: int | None) -> list[Task]:
        benchmark = benchmarks.get(self.source.benchmark)
        return benchmark.load(self.split, domain=self.domain, options=self.source.options, seed=self.seed, count=count)

    def _usable(self, loaded: Sequence[Task], unique: bool) -> list[Task]:
        own = Questions(loaded)
        kept = [task for task in loaded if not asks_the_same(task, self.forbidden, own)]
        self.loaded, self.shared = len(loaded), len(loaded) - len(kept)
        if unique:
            kept = list({conversation_key(task): task for task in reversed(kept)}.values())[::-1]
        self.repeated = self.loaded - self.shared - len(kept)
        return kept


def _everything(feeds: Sequence[_Feed]) -> list[Task]:
    unique = any(feed.split == "train" for feed in feeds)
    return [task for feed in feeds for task in feed.first(None, unique=unique)]


def _mix(feeds: Sequence[_Feed], count: int) -> list[Task]:
    """Tasks of the feeds in turn by weight. A feed that runs out leaves its place to the others."""
    total = sum(feed.source.weight for feed in feeds)
    wanted = [min(count, round(count * feed.source.weight / total) + 8) for feed in feeds]
    while True:
        pools = [feed.first(want, unique=True) for feed, want in zip(feeds, wanted, strict=True)]
        mixed, empty = _interleave(pools, [feed.source.weight for feed in feeds], count)
        growing = [i for i in empty if len(pools[i]) == wanted[i] < count]
        if len(mixed) == count and not growing:
            return mixed
        if not growing and not any(len(p) == w < count for p, w in zip(pools, wanted, strict=True)):
            return mixed
        wanted = [min(count, 2 * want) if len(p) == want else want for p, want in zip(pools, wanted, strict=True)]


def _interleave(pools: Sequence[Sequence[Task]], weights: Sequence[float], count: int) -> tuple[list[Task], set[int]]:
    """Smooth weighted round robin over the pools, repeated conversations left out; and the pools found empty."""
    position, credit = [0] * len(pools), [0.0] * len(pools)
    alive, empty = list(range(len(pools))), set[int]()
    mixed: list[Task] = []
    seen: set[str] = set()
    while alive and len(mixed) < count:
        for i in alive:
            credit[i] += weights[i]
        chosen = max(alive, key=lambda i: credit[i])
        while position[chosen] < len(pools[chosen]) and conversation_key(pools[chosen][position[chosen]]) in seen:
            position[chosen] += 1
        if position[chosen] == len(pools[chosen]):
            alive.remove(chosen)
            empty.add(chosen)
            continue
        credit[chosen] -= sum(weights[i] for i in alive)
        task = pools[chosen][position[chosen]]
        seen.add(conversation_key(task))
        mixed.append(task)
    return mixed, empty


def _too_few(task_set: TaskSet, part: Part, found: int, left_out: str) -> str:
    return (
        f"tasks.{part}.count asks for {task_set.count} tasks, but its sources have {found} different ones: "
        f"{left_out}. Lower the count, or add a source or generator."
    )


def _left_out(others: Sequence[str], feeds: Sequence[_Feed]) -> str:
    """What every source had, and why how many of them were dropped."""
    asked = f"ask what {' or '.join(others) or 'another part'} asks"
    return "; ".join(
        f"{f.source.benchmark} has {f.loaded}, of which {f.shared} {asked} and {f.repeated} repeat others"
        for f in feeds
    )


def _refuse_repeated_ids(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise DataError(f"two tasks have the id {task.id!r}: name each source and each task file once per split")
        seen.add(task.id)
