"""The page that shows a pipeline at work: steps, progress, money, time left, and where to look further."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cascade.reports.templates import environment

State = Literal["", "running", "done", "reused", "failed"]
TYPICAL_SECONDS = {
    "test_domain": 130,
    "generate_tier1": 10,
    "test_tier1": 137,
    "generate_tier2": 7,
    "test_tier2": 151,
    "generate_tier3": 7,
    "train_modifier": 351,
    "compress_modifier": 281,
    "validate_modifier": 110,
    "train_router": 50,
}
"""Of each step in the quickstart on two cores: how long they are beside one another, as far as one knows beforehand."""
_TELLING_SECONDS = 100
"""Of `TYPICAL_SECONDS` that must have been run before the pace says something of the rest."""


class Timed(Protocol):
    """A step as `time_left` needs it; see `Step`."""

    @property
    def state(self) -> State: ...

    @property
    def seconds(self) -> float | None: ...

    @property
    def seconds_left(self) -> float | None: ...


def time_left(steps: Mapping[str, Timed]) -> float | None:
    """Seconds to the end of a pipeline: what the steps to come take in the quickstart, at the pace of those behind us.

    Rough, since another base, other teachers and a GPU shift the weights; None until a long step is behind us, or
    where a step is not one of the pipeline's.
    """
    if not steps.keys() <= TYPICAL_SECONDS.keys():
        return None
    ended = {name: step.seconds for name, step in steps.items() if step.state in ("done", "reused") and step.seconds}
    typical = sum(TYPICAL_SECONDS[name] for name in ended)
    if typical < _TELLING_SECONDS:
        return None
    pace, left = sum(ended.values()) / typical, 0.0
    for name, step in steps.items():
        if step.state == "":
            left += pace * TYPICAL_SECONDS[name]
        elif step.state == "running":
            left += max(pace * TYPICAL_SECONDS[name] - (step.seconds or 0.0), step.seconds_left or 0.0)
    return left


@dataclass(frozen=True)
class Step:
    """One job of the pipeline.

    Attributes:
        state: "" if it has not begun; "reused" if it was done before.
        done: pieces of its present stage, of `total`; both 0 if it does not say.
        note: what the pieces are, or the figures of a finished job.
        seconds: that it has taken so far, None if that is not known.
        seconds_left: of its present stage at the present pace, None if there is none.
        link: relative address of what it left, "" if there is nothing yet.
    """

    name: str
    state: State = ""
    done: int = 0
    total: int = 0
    note: str = ""
    seconds: float | None = None
    seconds_left: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Tier:
    """One tier of teachers.

    Attributes:
        done: tasks with a verdict, of `total` that it is asked.
        spent_usd: on these tasks.
        budget_usd: its own limit, None if it has none besides the domain's.
        requests_per_minute: 0 if nothing is asked now.
        seconds_left: at the present pace, None if there is none.
    """

    number: int
    teacher: str
    done: int
    total: int
    verified: int
    spent_usd: float
    budget_usd: float | None = None
    requests_per_minute: float = 0.0
    seconds_left: float | None = None


@dataclass(frozen=True)
class Pipeline:
    """A pipeline at one moment.

    Attributes:
        state: of the whole.
        message: why it failed.
        budget_usd: of the domain.
        seconds: since this process began with it.
        refresh_s: how often the page is written, and looks for news.
        links: text and address of pages to go on to.
        commands: what a command shows, and the command.
    """

    domain: str
    state: State
    steps: Sequence[Step]
    tiers: Sequence[Tier]
    budget_usd: float
    seconds: float
    refresh_s: float
    message: str = ""
    links: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()

    @property
    def finished(self) -> int:
        """Steps that are done."""
        return sum(step.state in ("done", "reused") for step in self.steps)

    @property
    def seconds_left(self) -> float | None:
        """To its end, roughly; see `time_left`."""
        return time_left({step.name: step for step in self.steps}) if self.state == "running" else None

    @property
    def spent_usd(self) -> float:
        """By all tiers on these tasks."""
        return sum(tier.spent_usd for tier in self.tiers)


def render_progress(pipeline: Pipeline, now: float | None = None) -> str:
    """The page as text; while the pipeline runs it loads itself again every `refresh_s`.

    Args:
        now: Unix time that the page is of; left out, the present.
    """
    written = time.time() if now is None else now
    stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written))
    return environment().get_template("progress.html").render(p=pipeline, written=round(written), stamp=stamp)
