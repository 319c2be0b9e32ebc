"""One fold's probe, trained and tested in a Ray task."""

from __future__ import annotations

from collections.abc import Iterator

from cascade.artifacts import Run
from cascade.config import Config, PromptStyle
from cascade.models.base import end_token_ids, load_base
from cascade.models.student import Student
from cascade.tasks import Example, Task
from cascade.training.examples import encode_examples
from cascade.training.layout import most_tokens
from cascade.training.loop import TargetLoss, TorchEngine, run_steps
from cascade.training.lora import add_lora
from cascade.training.packing import plan_steps
from ray_jobs._probe import COMPLETIONS, VERDICTS, Event
from ray_jobs._share import limit_process


def probe_fold(
    config: Config,
    run: Run,
    examples: list[Example],
    tasks: list[Task],
    folds: dict[str, int],
    style: PromptStyle,
    fold: int,
) -> Iterator[Event]:
    """Train and test one fold's probe; verdicts go to the run in one part."""
    limit_process(config.execution, config.execution.cpus_per_actor)
    settings = config.probe.lora
    loaded = load_base(config.base)
    seen = [e for e in examples if folds[e.task_id] != fold]
    encoded = encode_examples(
        seen, loaded.tokenizer, max_length=settings.max_length, system=style.system, end_ids=end_token_ids(loaded)
    )
    if len(encoded.by_template) == len(seen) > 0:
        encoded.check(f"probe.lora.max_length = {settings.max_length}")
    mine = [t for t in tasks if folds[t.id] == fold]
    module = TargetLoss(add_lora(loaded, settings, config.seed + fold))
    row_tokens = config.execution.row_tokens or most_tokens(module.inputs)
    plan = plan_steps(encoded.examples, settings, config.seed + fold, row_tokens=row_tokens)
    total = len(plan) + 1
    for report in run_steps(TorchEngine(module, settings), plan, settings):
        yield "training", report.step + 1, total
    student = Student(
        loaded,
        modifier=f"probe{fold}",
        tokens=config.execution.student_tokens,
        temperature=config.student.temperature,
        max_tokens=config.student.max_tokens,
        seed=config.seed,
    )
    completions, verdicts = student.judged(mine, style)
    run.write_part(COMPLETIONS, completions)
    run.write_part(VERDICTS, verdicts)
    yield "testing", total, total
