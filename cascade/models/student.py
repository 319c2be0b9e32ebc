"""The student: a base model, with or without a modifier, that answers tasks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cascade import benchmarks
from cascade.config import PromptStyle
from cascade.errors import DataError
from cascade.models.base import LoadedBase
from cascade.models.chat import prompt_text
from cascade.models.generation import stream
from cascade.models.likelihood import Question, stream_logprobs
from cascade.models.rows import Generated, Request, decode
from cascade.models.worked_examples import NO_EXAMPLES, WorkedExamples, styled_messages
from cascade.tasks import Completion, Message, Task, Verdict

REPLY_THREADS = 4
"""Environments of conversations that reply at once, each in processes of its own."""
SCORERS = 4
"""Answers judged at once, each in a process of its own where code runs."""
TOKENIZED = 64
"""Tasks whose contexts and choices go through the tokenizer at once."""


@dataclass(frozen=True)
class Student:
    """Answers tasks with a loaded base.

    Answers end where the base's context does, cut off like those that reach their limit of tokens (finish reason
    "length"). A prompt that leaves no room for an answer, or not for every choice, gets none: its completion has finish
    reason "error", its verdict that outcome and the reason. Nothing is cut out of a prompt.

    Attributes:
        modifier: version label of whatever adapter is on the model, "" for none.
        tokens: in memory at once when it writes (see `generation.stream`); None: as suits the device.
    """

    loaded: LoadedBase
    modifier: str = ""
    tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def answer(
        self, tasks: Sequence[Task], style: PromptStyle, examples: WorkedExamples = NO_EXAMPLES
    ) -> list[Completion]:
        """One completion per task, in order."""
        by_id = {c.task_id: c for c in self.answers(tasks, style, examples)}
        return [by_id[t.id] for t in tasks]

    def answers(
        self, tasks: Sequence[Task], style: PromptStyle, examples: WorkedExamples = NO_EXAMPLES
    ) -> Iterator[Completion]:
        """One completion per task, as they are done."""
        yield from self._compare([t for t in tasks if t.form == "likelihood"])
        written = [t for t in tasks if t.form != "likelihood"]
        yield from self._write([t for t in written if t.max_turns == 1], style, examples)
        yield from self._talk([t for t in written if t.max_turns > 1], style)

    def judged(
        self, tasks: Sequence[Task], style: PromptStyle, examples: WorkedExamples = NO_EXAMPLES
    ) -> tuple[list[Completion], list[Verdict]]:
        """Completions and verdicts in the order of the tasks; answers are judged while others are written."""
        by_id = {t.id: t for t in tasks}
        completions, verdicts = {}, {}
        with ThreadPoolExecutor(SCORERS) as pool:
            for completion in self.answers(tasks, style, examples):
                completions[completion.task_id] = completion
                task = by_id[completion.task_id]
                verdicts[completion.task_id] = pool.submit(self._judge, task, completion)
            return [completions[t.id] for t in tasks], [verdicts[t.id].result() for t in tasks]

    def _judge(self, task: Task, completion: Completion) -> Verdict:
        """The benchmark's verdict, unless there was no room for an answer."""
        if completion.finish_reason != "error":
            return benchmarks.score(task, completion)
        evidence = (
            f"the prompt's {completion.prompt_tokens} tokens leave no room for an answer in the base's context of "
            f"{self.loaded.context} tokens"
        )
        return Verdict(task.id, completion.model, completion.modifier, "error", evidence=evidence)

    def prompt_ids(self, task: Task, style: PromptStyle, examples: WorkedExamples = NO_EXAMPLES) -> list[int]:
        """Token ids of a task's prompt."""
        tokenizer = self.loaded.tokenizer
        if task.form != "chat":
            return list(tokenizer(task.messages[-1].content).input_ids)
        text = prompt_text(tokenizer, styled_messages(task, style, examples))
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def _write(self, tasks: Sequence[Task], style: PromptStyle, examples: WorkedExamples) -> Iterator[Completion]:
        requests = [self._request(task, self.prompt_ids(task, style, examples)) for task in tasks]
        for i, answer in stream(self.loaded, requests, tokens=self.tokens):
            yield Completion(
                task_id=tasks[i].id,
                model=self.loaded.name,
                modifier=self.modifier,
                text=self._text(tasks[i], requests[i], answer),
                finish_reason=answer.finish_reason if requests[i].max_tokens else "error",
                prompt_tokens=len(requests[i].prompt),
                completion_tokens=len(answer.token_ids),
                seconds=answer.seconds,
            )

    def _request(self, task: Task, prompt: Sequence[int]) -> Request:
        """What a task's prompt asks for; no token where the base's context leaves none."""
        most = min(task.max_tokens, self.max_tokens)
        if self.loaded.context is not None:
            most = max(0, min(most, self.loaded.context - len(prompt)))
        return Request(
            prompt=prompt,
            max_tokens=most,
            stop=task.stop,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=_seed_of(self.seed, task.id),
        )

    def _text(self, task: Task, request: Request, answer: Generated) -> str:
        """An answer's text; where it goes on with the prompt's, it keeps the blank that it begins with.

        Decoders of SentencePiece's kind (Llama 2, Mistral) take one from the beginning of whatever they decode, so that
        the first line of code would be indented wrongly.
        """
        if task.form == "chat" and task.messages[-1].role != "assistant":
            return answer.text
        last, first = list(request.prompt[-1:]), list(answer.token_ids[:1])
        behind = decode(self.loaded, last + first).removeprefix(decode(self.loaded, last))
        return " " + answer.text if behind == " " + decode(self.loaded, first) else answer.text

    def _talk(self, tasks: Sequence[Task], style: PromptStyle) -> Iterator[Completion]:
        """Conversations, all at once: every round answers those that go on, in batches as ever.

        One that has filled the base's context ends there, cut off, and is judged by what was said.
        """
        rounds: dict[str, list[Completion]] = {t.id: [] for t in tasks}
        said: dict[str, tuple[Message, ...]] = {t.id: () for t in tasks}
        pending = list(tasks)
        with ThreadPoolExecutor(REPLY_THREADS) as pool:
            while pending:
                asked = [replace(t, messages=(*t.messages, *said[t.id])) for t in pending]
                for completion in self._write(asked, style, NO_EXAMPLES):
                    rounds[completion.task_id].append(completion)
                    if completion.finish_reason != "error":
                        said[completion.task_id] += (Message("assistant", completion.text),)
                replies = list(pool.map(lambda t: _reply(t, rounds[t.id][-1], said[t.id]), pending))
                for task, reply in zip(pending, replies, strict=True):
                    said[task.id] += reply
                    if not reply:
                        yield _whole(rounds[task.id], said[task.id])
                pending = [t for t, reply in zip(pending, replies, strict=True) if reply]

    def _compare(self, tasks: Sequence[Task]) -> Iterator[Completion]:
        """Log-likelihoods of the choices; the completion's text is the likeliest choice."""
        questions, context = _split_choices(self.loaded, tasks), self.loaded.context
        fits = [i for i, question in enumerate(questions) if context is None or question.length <= context]
        for i in sorted(set(range(len(tasks))).difference(fits)):
            yield Completion(
                task_id=tasks[i].id,
                model=self.loaded.name,
                modifier=self.modifier,
                text="",
                finish_reason="error",
                prompt_tokens=len(questions[i].context),
            )
        for fitting, scores, seconds in stream_logprobs(self.loaded, [questions[i] for i in fits]):
            i = fits[fitting]
            yield Completion(
                task_id=tasks[i].id,
                model=self.loaded.name,
                modifier=self.modifier,
                text=tasks[i].choices[max(range(len(scores)), key=scores.__getitem__)],
                prompt_tokens=len(questions[i].context),
                seconds=seconds,
                choice_logprobs=tuple(scores),
                choice_tokens=tuple(map(len, questions[i].choices)),
            )


def _reply(task: Task, answer: Completion, said: tuple[Message, ...]) -> tuple[Message, ...]:
    """What follows a conversation's last answer; nothing where there was no room for one."""
    return () if answer.finish_reason == "error" else benchmarks.reply(task, said)


def _whole(rounds: Sequence[Completion], said: tuple[Message, ...]) -> Completion:
    """The answers of one conversation as one completion, which is cut off where any of them was, or had no room."""
    answers = [c for c in rounds if c.finish_reason != "error"]
    if not answers:
        return rounds[0]
    return replace(
        answers[-1],
        finish_reason="stop" if all(c.finish_reason == "stop" for c in rounds) else "length",
        turns=said,
        prompt_tokens=sum(c.prompt_tokens for c in answers),
        completion_tokens=sum(c.completion_tokens for c in answers),
        seconds=sum(c.seconds for c in answers),
    )


def _split_choices(loaded: LoadedBase, tasks: Sequence[Task]) -> list[Question]:
    """Token ids of each task's context and choices, cut where context + choice, tokenised together, departs.

    As in lm-evaluation-harness, trailing spaces of the context belong to the choice, and a context without tokens
    becomes the tokenizer's first token. Where a choice's beginning merges with the context's end into one token,
    that token belongs to the choices: cut behind it, a choice could be left without tokens and be certain.
    With worked examples this is much text, which the tokenizer reads with threads of its own; in lots, since what it
    returns takes far more memory than the ids.

    Raises:
        DataError: a choice adds nothing to the context.
    """
    tokenizer, questions = loaded.tokenizer, []
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    for start in range(0, len(tasks), TOKENIZED):
        lot = tasks[start : start + TOKENIZED]
        contexts = [task.messages[-1].content for task in lot]
        texts = [
            text
            for task, context in zip(lot, contexts, strict=True)
            for text in (context.rstrip(), *(context + choice for choice in task.choices))
        ]
        found = iter(tokenizer(texts).input_ids)
        for task in lot:
            ids, wholes = next(found), [next(found) for _ in task.choices]
            alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(ids, *wholes, strict=False))
            cut = sum(1 for _ in alike)
            if any(len(whole) == cut for whole in wholes):
                raise DataError(f"task {task.id}: a choice is empty; give every choice a text of its own")
            questions.append(Question(ids[:cut] or first, [whole[cut:] for whole in wholes]))
    return questions


def _seed_of(seed: int, task_id: str) -> int:
    """A seed of a task's own, so that sampling does not depend on what shares its batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{task_id}".encode()).digest()[:7], "little")
