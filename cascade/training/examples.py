"""Chat examples to token ids with a mask of what is learned: the assistant's own tokens and the end token.

The conversation is cut at the places where the model would be asked: a target is what the chat template adds
between "prompt with generation prompt" and "conversation with this answer". Context and target are tokenised
apart, as they are when the model answers, and a target ends with its end token, which is learned too (also where
the padding token is the same id: nothing here looks at padding). A prefill is context: the model was given it. So is
a thought that a template opens when it asks, and leaves out of what was said (DeepSeek-R1's, QwQ's).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cascade.errors import DataError
from cascade.models.chat import conversation_text, prompt_text
from cascade.tasks import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")
"""How a prompt ends whose template opens a thought."""


@dataclass(frozen=True)
class EncodedExample:
    """One conversation as the model is trained on it.

    Attributes:
        sample_id: the example's task id.
        input_ids: tokens of the whole conversation up to the last learned token.
        is_target: per token, whether predicting it is learned; same length as `input_ids`.
    """

    sample_id: str
    input_ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    def __post_init__(self) -> None:
        _ = self.ids, self.learned  # made here: in a step a GPU would wait for them

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        return len(self.learned)

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """`input_ids` as an array, which goes into a row in every epoch."""
        return np.asarray(self.input_ids, np.int64)

    @cached_property
    def learned(self) -> NDArray[np.int64]:
        """Places of the learned tokens, shape (targets,)."""
        return np.flatnonzero(self.is_target)

    @property
    def asked(self) -> NDArray[np.int64]:
        """Places whose next token is learned. The first token of all has none before it that could be asked for it."""
        return self.learned[self.learned > 0] - 1


@dataclass(frozen=True)
class EncodedSet:
    """What can be trained on, and what was refused and why (sample ids).

    Attributes:
        by_template: those that the chat template refuses, or whose answer it does not show as it was given, or would
            end too soon.
        refusal: what is to be said of the first of these.
    """

    examples: tuple[EncodedExample, ...]
    without_target: tuple[str, ...]
    too_long: tuple[str, ...]
    by_template: tuple[str, ...] = ()
    refusal: str = ""

    def check(self, longest: str) -> None:
        """
        Args:
            longest: the setting that limits the length, e.g. "training.lora.max_length = 512".

        Raises:
            DataError: nothing can be trained on.
        """
        if not self.examples:
            refused = f"; {self.refusal}" if self.refusal else ""
            raise DataError(
                f"none of the examples can be trained on: {len(self.too_long)} are longer than {longest} tokens, "
                f"{len(self.without_target)} have no assistant text, {len(self.by_template)} do not go through the "
                f"base's chat template{refused}"
            )


def encode_example(
    sample_id: str,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    end_ids: frozenset[int] = frozenset(),
) -> EncodedExample:
    """Token ids and target mask of one conversation.

    Args:
        messages: ends with an assistant message; every assistant message that answers something is learned, unless
            the template rewrites earlier turns (some drop past reasoning): then the last one alone.
        system: put in front if the conversation has no system message of its own.
        end_ids: ids that end an answer; the tokenizer's end token is always among them.

    Raises:
        DataError: the chat template refuses the conversation, or an answer goes on behind an end token that it holds
            as text: that could not be learned.
    """
    ends = end_ids | {tokenizer.eos_token_id}
    if system and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    answers = [i for i, m in enumerate(messages) if i and m.role == "assistant" and not _goes_on(messages, i)]
    for end_text in (str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends)) if token):
        if any(messages[i].content.partition(end_text)[2].strip() for i in answers):
            raise DataError(f"an answer holds {end_text}, which would end it there: take it out of the answer")
    segments = _segments(messages, answers, tokenizer) or _segments(messages, answers[-1:], tokenizer) or []
    ids: list[int] = []
    mask: list[bool] = []
    end_added = False
    for context, answer in segments:
        context_ids = tokenizer(context, add_special_tokens=False).input_ids
        if end_added and context_ids[:1] == ids[-1:]:
            context_ids = context_ids[1:]  # some templates end an answer with what they put before the next question
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        end = next((i for i, t in enumerate(answer_ids) if t in ends), None)
        end_added = end is None
        if end is None:
            answer_ids, rest = [*answer_ids, tokenizer.eos_token_id], []
        else:
            answer_ids, rest = answer_ids[: end + 1], answer_ids[end + 1 :]
        ids += [*context_ids, *answer_ids, *rest]
        mask += [False] * len(context_ids) + [True] * len(answer_ids) + [False] * len(rest)
    while mask and not mask[-1]:
        mask.pop()
        ids.pop()
    return EncodedExample(sample_id, tuple(ids), tuple(mask))


def _goes_on(messages: Sequence[Message], i: int) -> bool:
    """Whether the assistant itself continues this message: then it is a prefill, which was given to the model."""
    return messages[i].role == "assistant" and i + 1 < len(messages) and messages[i + 1].role == "assistant"


def _segments(
    messages: Sequence[Message], answers: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]] | None:
    """(context text, answer text) per learned answer, or None where the template rewrites what came before."""
    if not answers:
        return None
    whole = conversation_text(tokenizer, _joined(messages[: answers[-1] + 1]))
    consumed, segments = "", []
    for i in answers:
        before = prompt_text(tokenizer, _joined(messages[:i]))
        after = conversation_text(tokenizer, _joined(messages[: i + 1]))
        if not whole.startswith(after):  # some templates put the end token behind a conversation, not behind a turn
            after = after.removesuffix(str(tokenizer.eos_token))
        if not before.startswith(consumed):
            return None
        if after.startswith(before):
            answer = after[len(before) :]
            found: str | None = answer if messages[i].content.strip() in answer else None
        else:  # an earlier answer stands in the conversation without its thought: it is not what the model was asked
            found = _behind_thought(before, after, messages[i].content) if i == answers[-1] == answers[0] else None
        if found is None or messages[i].content.strip() == "":
            return None
        segments.append((before[len(consumed) :], found))
        consumed = after
    return segments


def _behind_thought(before: str, after: str, content: str) -> str | None:
    """What the model says where the template asks with an opened thought that it leaves out of what was said.

    Args:
        before: the prompt. after: the conversation with the answer. content: the answer, perhaps with its thought.

    Returns:
        The answer from within the thought on, ended as the template ends it; None if the template does something else.
    """
    opened = _OPENED.search(before)
    if opened is None or not after.startswith(before[: opened.start()]):
        return None
    shown, whole = after[opened.start() :], content.strip()
    visible = whole.rpartition(f"</{opened[1]}>")[2].strip()
    if not visible or visible not in shown:
        return None
    said = whole.removeprefix(f"<{opened[1]}>").lstrip("\n") if visible != whole else visible
    return said + shown[shown.rindex(visible) + len(visible) :]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """The conversation with each prefill and what continues it as one message."""
    joined: list[Message] = []
    for i, message in enumerate(messages):
        if i and _goes_on(messages, i - 1):
            joined[-1] = Message(message.role, joined[-1].content + message.content)
        else:
            joined.append(message)
    return joined


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    system: str | None = None,
    end_ids: frozenset[int] = frozenset(),
) -> EncodedSet:
    """Encode a training set; what cannot be learned from, and what is longer than a row, is refused and listed."""
    conversations = [(e.task_id, e.messages) for e in examples]
    return encode_conversations(conversations, tokenizer, max_length=max_length, system=system, end_ids=end_ids)


def encode_conversations(
    conversations: Sequence[tuple[str, Sequence[Message]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    system: str | None = None,
    end_ids: frozenset[int] = frozenset(),
) -> EncodedSet:
    """As `encode_examples`, of sample ids and messages."""
    good: list[EncodedExample] = []
    without: list[str] = []
    long: list[str] = []
    by_template: dict[str, str] = {}
    for sample_id, messages in conversations:
        try:
            encoded = encode_example(sample_id, messages, tokenizer, system=system, end_ids=end_ids)
        except DataError as error:
            by_template[sample_id] = str(error)
            continue
        if encoded.targets == 0 and _answers_something(messages):
            by_template[sample_id] = (
                f"the chat template of {tokenizer.name_or_path or 'the base'} does not show the answer as it was "
                "given behind what it asks with: take another base, or give it another chat_template.jinja"
            )
        elif encoded.targets == 0:
            without.append(sample_id)
        elif len(encoded) > max_length:
            long.append(sample_id)
        else:
            good.append(encoded)
    refusal = next((f"{name}: {why}" for name, why in by_template.items()), "")
    return EncodedSet(tuple(good), tuple(without), tuple(long), tuple(by_template), refusal)


def _answers_something(messages: Sequence[Message]) -> bool:
    return len(messages) > 1 and messages[-1].role == "assistant" and bool(messages[-1].content.strip())
