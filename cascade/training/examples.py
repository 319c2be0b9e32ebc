"""Chat examples to token ids with a mask of what is learned: the assistant's own tokens and the end token.

The conversation is cut at the places where the model would be asked: a target is what the chat template adds
between "prompt with generation prompt" and "conversation with this answer". Context and target are tokenised
apart, as they are when the model answers, and a target ends with its end token, which is learned too (also where
the padding token is the same id: nothing here looks at padding). A prefill is context: the model was given it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cascade.models.chat import conversation_text, prompt_text
from cascade.tasks import Example, Message


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

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        return sum(self.is_target)


@dataclass(frozen=True)
class EncodedSet:
    """What can be trained on, and what was refused and why (sample ids)."""

    examples: tuple[EncodedExample, ...]
    without_target: tuple[str, ...]
    too_long: tuple[str, ...]


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
        DataError: the chat template refuses the conversation.
    """
    ends = end_ids | {tokenizer.eos_token_id}
    if system and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    answers = [i for i, m in enumerate(messages) if i and m.role == "assistant" and not _goes_on(messages, i)]
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
        if not before.startswith(consumed) or not after.startswith(before):
            return None
        answer = after[len(before) :]
        if messages[i].content.strip() == "" or messages[i].content.strip() not in answer:
            return None
        segments.append((before[len(consumed) :], answer))
        consumed = after
    return segments


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
    """Encode a training set; examples without a target and those longer than a row are refused and listed."""
    good: list[EncodedExample] = []
    without: list[str] = []
    long: list[str] = []
    for example in examples:
        encoded = encode_example(example.task_id, example.messages, tokenizer, system=system, end_ids=end_ids)
        if encoded.targets == 0:
            without.append(example.task_id)
        elif len(encoded) > max_length:
            long.append(example.task_id)
        else:
            good.append(encoded)
    return EncodedSet(tuple(good), tuple(without), tuple(long))
