"""What goes before a question.

A prompt style decides the system message and how many worked examples go before the question. Worked examples
come from the training split, of the same category first, and never the task itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cascade import benchmarks
from cascade.config import PromptStyle
from cascade.errors import DataError
from cascade.tasks import Message, Task


@dataclass(frozen=True)
class WorkedExamples:
    """Training tasks to show before a question, with their reference answers.

    Attributes:
        by_category: (benchmark, category) -> a few tasks. See `from_pool`.
    """

    by_category: Mapping[tuple[str, str], Sequence[Task]]

    @classmethod
    def from_pool(cls, pool: Sequence[Task], most: int = 8) -> WorkedExamples:
        """Keep the first `most` + 1 chat tasks of each category whose answer is known: one may be left out as the
        question."""
        kept: dict[tuple[str, str], list[Task]] = {}
        for task in pool:
            if task.form == "chat" and len(task.messages) == 1:
                same = kept.setdefault((task.benchmark, task.category), [])
                if len(same) <= most and _answer_known(task):
                    same.append(task)
        return cls(kept)

    def for_task(self, task: Task, count: int) -> list[Message]:
        """`count` question-answer pairs: of the task's own category, then of others; never the question itself."""
        if count == 0 or task.form != "chat" or len(task.messages) != 1:
            return []
        own = (task.benchmark, task.category)
        others = (t for key, tasks in self.by_category.items() if key != own for t in tasks)
        candidates = itertools.chain(self.by_category.get(own, ()), others)
        shown = itertools.islice((t for t in candidates if t.id != task.id and t.prompt != task.prompt), count)
        pairs = [(t.messages[-1], Message("assistant", benchmarks.get(t.benchmark).reference_answer(t))) for t in shown]
        return [message for pair in pairs for message in pair]


def _answer_known(task: Task) -> bool:
    try:
        return bool(benchmarks.get(task.benchmark).reference_answer(task).strip())
    except DataError:  # e.g. unit tests without a solution
        return False


NO_EXAMPLES = WorkedExamples({})


def styled_messages(task: Task, style: PromptStyle, examples: WorkedExamples = NO_EXAMPLES) -> list[Message]:
    """The conversation as the student sees it: system message, worked examples, the task's own messages."""
    own = list(task.messages)
    system = [Message("system", style.system)] if style.system and own[0].role != "system" else []
    return [*system, *examples.for_task(task, style.shots), *own]
