"""How a conversation offers functions to call: one way for BFCL, tasks of one's own and the endpoint's `tools`."""

from __future__ import annotations

from collections.abc import Iterable

from cascade.tasks import Message

SYSTEM_PROMPT = """You are an expert in composing functions.You are given a question and a set of possible functions. \
Based on the question, you will need to make one or more function/tool calls to achieve the purpose. If none of the \
functions can be used, point it out. If the given question lacks the parameters required by the function, also point \
it out.

You should only return the function calls in your response.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)].  You SHOULD NOT include \
any other text in the response.

At each turn, you should try your best to complete the tasks requested by the user within the current turn. Continue \
to output functions to call until you have fulfilled the user's request to the best of your ability. Once you have no \
more functions to call, the system will consider the current turn complete and proceed to the next turn or task.

Here is a list of functions in json format that you can invoke.
{functions}
"""
"""BFCL's own system prompt as its harness builds it, to the character (Apache-2.0)."""


def with_functions(messages: Iterable[Message], functions: str) -> list[Message]:
    """A conversation with functions described in its system message, before what that says itself.

    Args:
        functions: their names, descriptions and parameters, a JSON list indented by four.
    """
    said = list(messages)
    own = [m.content for m in said if m.role == "system"]
    system = "\n\n".join([SYSTEM_PROMPT.format(functions=functions), *own])
    return [Message("system", system), *(m for m in said if m.role != "system")]


def describes_functions(message: Message) -> bool:
    """Whether it is a system message that offers functions to call, see `with_functions`."""
    return message.role == "system" and message.content.startswith(SYSTEM_PROMPT.partition("{functions}")[0])
