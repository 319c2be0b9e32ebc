"""A student at work in an actor, with the base in its memory."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cascade.artifacts import Run
from cascade.compression.apply import LoraSlot
from cascade.config import Config, PromptStyle
from cascade.models.base import load_base
from cascade.models.student import Student
from cascade.models.worked_examples import WorkedExamples
from cascade.tasks import Task, Verdict, from_table, to_table
from ray_jobs._results import read_adapter
from ray_jobs._share import limit_process


class LoadedStudent:
    """Holds one base; answers and scores a batch of tasks at a time, assignment by assignment."""

    def __init__(
        self,
        config: Config,
        run: Run,
        settings: dict[str, tuple[PromptStyle, str | None, str]],
        examples: WorkedExamples,
    ) -> None:
        limit_process(config.execution, config.execution.cpus_per_actor)
        self.config, self.run, self.settings = config, run, settings
        self.examples = examples
        self.loaded = load_base(config.base)
        self.slot: LoraSlot | None = None
        self.filled: str | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        names = batch.column("assignment")
        return pa.concat_tables(
            [self._judged(name, batch.filter(pc.equal(names, name))) for name in names.unique().to_pylist()]
        )

    def _judged(self, name: str, block: pa.Table) -> pa.Table:
        """Verdicts on the tasks of one assignment, which are kept before they are told."""
        style, adapter, label = self.settings[name]
        tasks = from_table(Task, block)
        self._use(adapter)
        completions, verdicts = self._student(label).judged(tasks, style, self.examples)
        self.run.write_part(f"{name}_completions", completions)
        self.run.write_part(f"{name}_verdicts", verdicts)
        return to_table(Verdict, verdicts).append_column("assignment", pa.array([name] * len(verdicts)))

    def _student(self, label: str) -> Student:
        student = self.config.student
        return Student(
            self.loaded,
            modifier=label,
            tokens=self.config.execution.student_tokens,
            temperature=student.temperature,
            max_tokens=student.max_tokens,
            seed=self.config.seed,
        )

    def _use(self, adapter: str | None) -> None:
        """Have this adapter, and no other, on the base."""
        if adapter == self.filled:
            return
        if self.slot is None:
            self.slot = LoraSlot(self.loaded.model, int8=self.config.serving.weights == "int8")
        if adapter is None:
            self.slot.clear()
        else:
            self.slot.fill(read_adapter(self.run.store, adapter))
        self.filled = adapter
