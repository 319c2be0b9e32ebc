"""What likelihood-scored multiple choice shares: picking the likeliest choice, with and without length.

`acc` compares sums of log-probabilities; `acc_norm` divides each by the choice's length in characters, as
lm-evaluation-harness does (by bytes is its `acc_bytes`). Where a model's API gives no likelihoods, the chat form
reads a letter.
"""

from __future__ import annotations

import math

from cascade.scoring.extraction import read_choice
from cascade.tasks import Completion, Task, Verdict


def likeliest(task: Task, completion: Completion, *, per_character: bool) -> int | None:
    """Index of the choice with the highest (per-character) log-likelihood; the first of equals.

    None where a likelihood is missing or not finite: of a model that gives NaN nothing is the likeliest. Choices carry
    the blank that joins them to the prompt; it does not count as length.
    """
    scores = completion.choice_logprobs
    if len(scores) != len(task.choices) or not scores or not all(map(math.isfinite, scores)):
        return None
    if per_character:
        scores = tuple(s / max(1, len(c.removeprefix(" "))) for s, c in zip(scores, task.choices, strict=True))
    return max(range(len(scores)), key=lambda i: scores[i])


def judge_choice(task: Task, completion: Completion, *, per_character: bool) -> Verdict:
    """Verdict of a task whose reference is {"answer": index, "labels": [...], "texts": [...]}."""
    labels, right = task.reference["labels"], task.reference["answer"]
    evidence, chosen = "", None
    if task.form == "likelihood":
        chosen = likeliest(task, completion, per_character=per_character)
        if chosen is None:
            evidence = f"{len(completion.choice_logprobs)} log-likelihoods for {len(task.choices)} choices"
            if any(not math.isfinite(s) for s in completion.choice_logprobs):
                evidence += f", not all of them finite: {list(completion.choice_logprobs)}; the model has diverged"
            return Verdict(task.id, completion.model, completion.modifier, "error", "", evidence)
    else:
        reading = read_choice(completion.text, dict(zip(labels, task.reference["texts"], strict=True)))
        if reading.ambiguous:
            evidence = f"several different answers: {', '.join(reading.candidates)}"
            return Verdict(task.id, completion.model, completion.modifier, "fail", "", evidence)
        if reading.answer is None:
            return Verdict(task.id, completion.model, completion.modifier, "unparsed", "", "no choice named")
        chosen = labels.index(reading.answer)
    if chosen != right:
        evidence = f"chose ({labels[chosen]}) {task.reference['texts'][chosen]}"
    outcome = "pass" if chosen == right else "fail"
    return Verdict(task.id, completion.model, completion.modifier, outcome, labels[chosen], evidence)  # type: ignore[arg-type]
