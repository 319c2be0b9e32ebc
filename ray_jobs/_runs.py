"""Which run each job has: the fingerprints of a whole pipeline, computed from the config before anything runs.

A fingerprint covers what decides a job's result: the sections of the config that it reads, and the fingerprints of
the jobs before it. `execution` is in none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from cascade import modifiers
from cascade.artifacts import Run, open_run
from cascade.benchmarks.mixture import load_tasks
from cascade.config import Config, Judge, Part, Teacher
from cascade.fingerprints import fingerprint
from cascade.models.files import base_sha256
from cascade.store import Store
from cascade.tasks import Task, message_hash

RESULT_VERSION = 3
"""Raised when a change of the code changes results, so that runs made before are not taken for new ones."""

NOT_DECISIVE = {"zero_stage", "offload", "checkpoint_steps", "gradient_checkpointing", "trackers"}
"""Settings of the training that decide how, and not what, is computed."""


@dataclass(frozen=True)
class Runs:
    """The runs of one config in its store, and the tasks that they work on (loaded once)."""

    config: Config

    @cached_property
    def store(self) -> Store:
        return Store(self.config.storage)

    @cached_property
    def train_tasks(self) -> list[Task]:
        return load_tasks(self.config, "train")

    @cached_property
    def validation_tasks(self) -> list[Task]:
        return load_tasks(self.config, "validation")

    @cached_property
    def test_tasks(self) -> list[Task]:
        return load_tasks(self.config, "test")

    @cached_property
    def general_tasks(self) -> list[Task]:
        return load_tasks(self.config, "general")

    @cached_property
    def base_sha256(self) -> str:
        return base_sha256(self.config.base)

    def run(self, job: str) -> Run:
        """The run of a job of this config, whether it exists yet or not."""
        run: Run = getattr(self, job)
        return run

    @cached_property
    def test_domain(self) -> Run:
        return self._open(
            "test_domain",
            base=self.base_sha256,
            dtype=self.config.base.dtype,
            student=self.config.student,
            seed=self.config.seed,
            tasks=[self._tasks_hash("train"), self._tasks_hash("validation")],
        )

    @cached_property
    def embed_failures(self) -> Run:
        """Not a job of its own: the embeddings of what `test_domain` left unsolved, made when first wanted."""
        return self._open("embed_failures", failures=self.test_domain.fingerprint)

    @cached_property
    def generate_tier1(self) -> Run:
        return self._generate(1, self.test_domain)

    @cached_property
    def test_tier1(self) -> Run:
        return self._test(1, self.generate_tier1)

    @cached_property
    def generate_tier2(self) -> Run:
        return self._generate(2, self.test_tier1)

    @cached_property
    def test_tier2(self) -> Run:
        return self._test(2, self.generate_tier2)

    @cached_property
    def generate_tier3(self) -> Run:
        return self._generate(3, self.test_tier2)

    @cached_property
    def train_modifier(self) -> Run:
        training = self.config.training.model_dump(mode="json", exclude=NOT_DECISIVE)
        return self._open(
            "train_modifier",
            examples=self.generate_tier3.fingerprint,
            training=training,
            test_tasks=self._tasks_hash("test"),
            **self._general,
            protect=self.config.tasks.protect,
            **({"clusters": self.config.clusters} if self.config.clusters.cap else {}),
        )

    @cached_property
    def compress_modifier(self) -> Run:
        return self._open(
            "compress_modifier",
            modifier=self.train_modifier.fingerprint,
            compression=self.config.compression,
            **({"weights": "int8"} if self.config.serving.weights == "int8" else {}),  # decides sizes and numbers
        )

    @cached_property
    def validate_modifier(self) -> Run:
        return self._open(
            "validate_modifier",
            modifier=self.compress_modifier.fingerprint,
            test_tasks=self._tasks_hash("test"),
            **self._general,
            reference=self.config.reference,
        )

    @cached_property
    def train_router(self) -> Run:
        return self._open(
            "train_router",
            modifier=self.validate_modifier.fingerprint,
            router=self.config.router,
            others=[current.sha256 for d in self._other_domains if (current := modifiers.current(self.store, d))],
        )

    @property
    def _other_domains(self) -> list[str]:
        return [d for d in modifiers.list_domains(self.store) if d != self.config.domain]

    def generate(self, tier: int) -> Run:
        return self.run(f"generate_tier{tier}")

    def test(self, tier: int) -> Run:
        """The test after a tier; tier 0 is the bare base on the whole domain."""
        return self.run(f"test_tier{tier}" if tier else "test_domain")

    def _generate(self, tier: int, failures: Run) -> Run:
        teacher = self.config.tier(tier)
        return self._open(
            f"generate_tier{tier}",
            failures=failures.fingerprint,
            teacher=_what_decides_answers(teacher),
            tier=tier,
            **({"judge": _what_decides_verdicts(self.config.judge)} if self.config.judge else {}),
            **({"predictor": self.config.predictor} if self.config.predictor.enabled and tier < 3 else {}),
        )

    def _test(self, tier: int, answers: Run) -> Run:
        return self._open(f"test_tier{tier}", answers=answers.fingerprint, probe=self.config.probe)

    def _open(self, job: str, **decides: object) -> Run:
        return open_run(self.store, self.config.domain, job, version=RESULT_VERSION, **decides)

    @property
    def _general(self) -> dict[str, str]:
        return {"general_tasks": self._tasks_hash("general")} if self.config.tasks.general else {}

    def _tasks_hash(self, part: Part) -> str:
        tasks: list[Task] = getattr(self, f"{part}_tasks")
        return fingerprint(
            tasks=[[message_hash(t.messages), *(getattr(t, name) for name in _OF_A_TASK)] for t in tasks]
        )


_OF_A_TASK = [f.name for f in fields(Task) if f.name not in ("messages", "domain", "split")]
"""Fields that decide how a task is asked, answered, scored and reported, beside its messages."""


def _what_decides_verdicts(judge: Judge) -> dict[str, object]:
    """A judge without what decides when and at what price it answers."""
    return {"model": _what_decides_answers(judge.model), "rubric": judge.rubric}


def _what_decides_answers(teacher: Teacher) -> dict[str, object]:
    """A teacher without its limits, prices and budgets: those decide when and what it costs, not what it says."""
    left_out = dict.fromkeys(_NO_ANSWER, True) | {"answer_key": {"latency_ms"}}
    answer: dict[str, object] = teacher.model_dump(mode="json", exclude=left_out)
    return answer | {"endpoints": [e.base_url for e in teacher.endpoints]}


_NO_ANSWER = (
    "endpoints",
    "input_usd_per_million",
    "output_usd_per_million",
    "cached_input_usd_per_million",
    "price_source",
    "timeout_s",
    "mode",
    "batch_price_share",
    "retries",
    "budget_usd",
    "expected_share",
)
