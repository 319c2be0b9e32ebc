"""Conversations as text, by the base's own chat template: the same for what is answered and for what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from cascade.errors import DataError
from cascade.tasks import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What the model continues: up to the place where the assistant speaks, or goes on if it has the last word.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    prefill = messages[-1].role == "assistant"
    return _render(tokenizer, messages, ask=not prefill, go_on=prefill)


def conversation_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """A whole conversation, each turn ended as the template ends it.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    return _render(tokenizer, messages, ask=False, go_on=False)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool, go_on: bool) -> str:
    conversation = [m.as_dict() for m in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=ask, continue_final_message=go_on
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(m.role for m in messages)
        raise DataError(
            f"the base's chat template refuses a conversation of {roles}: {error}. Leave out what it does not know; "
            "the system message is student.prompts[].system of the config, the other messages are the task's own"
        ) from error
    assert isinstance(text, str)
    return text
