"""Chat examples to token ids with a mask of what is learned: the assistant's own tokens and the end token.

The conversation is cut at the places where the model would be asked: a target is what the chat template adds
between "prompt with generation prompt" and "conversation with this answer". Context and target are tokenised
apart, as they are when the model answers, and a target ends with its end token, which is learned too (also where
the padding token is the same id: nothing here looks at padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

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
        messages: ends with an assistant message; every assistant message is learned, unless the template rewrites
            earlier turns (some drop past reasoning): then the last one alone.
        system: put in front if the conversation has no system message of its own.
        end_ids: ids that end an answer; the tokenizer's end token is always among them.
    """
    ends = end_ids | {tokenizer.eos_token_id}
    if system and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    segments = _segments(messages, answers, tokenizer) or _segments(messages, answers[-1:], tokenizer) or []
    ids: list[int] = []
    mask: list[bool] = []
    for context, answer in segments:
        context_ids = tokenizer(context, add_special_tokens=False).input_ids
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        end = next((i for i, t in enumerate(answer_ids) if t in ends), None)
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


def _segments(
    messages: Sequence[Message], answers: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]] | None:
    """(context text, answer text) per learned answer, or None where the template rewrites what came before."""
    consumed, segments = "", []
    for i in answers:
        before = _render(messages[:i], tokenizer, ask=True)
        after = _render(messages[: i + 1], tokenizer, ask=False)
        if not before.startswith(consumed) or not after.startswith(before):
            return None
        answer = after[len(before) :]
        if messages[i].content.strip() == "" or messages[i].content.strip() not in answer:
            return None
        segments.append((before[len(consumed) :], answer))
        consumed = after
    return segments


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool) -> str:
    text = tokenizer.apply_chat_template([m.as_dict() for m in messages], tokenize=False, add_generation_prompt=ask)
    assert isinstance(text, str)
    return text


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
