"""The Berkeley Function-Calling Leaderboard's own code as an oracle: runs in an environment of its own.

`perf/verdicts.py` makes that environment: the pinned `bfcl-eval` wheel without its dependencies, and the few small
packages that its checkers need. The list of models, which imports every vendor's SDK, is replaced by an empty one.
Reads one JSON request per line, writes one JSON answer per line: see `answer`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import types
from typing import Any


class _NoModel(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        return types.SimpleNamespace(underscore_to_dot=False)


_models = types.ModuleType("bfcl_eval.constants.model_config")
_models.MODEL_CONFIG_MAPPING = _NoModel()  # type: ignore[attr-defined]
sys.modules["bfcl_eval.constants.model_config"] = _models

from bfcl_eval.constants.enums import Language, ReturnFormat  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker  # noqa: E402
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import is_empty_execute_response  # noqa: E402
from bfcl_eval.model_handler.utils import (  # noqa: E402
    default_decode_ast_prompting,
    default_decode_execute_prompting,
    system_prompt_pre_processing_chat_model,
)
from bfcl_eval.utils import (  # noqa: E402
    is_empty_output,
    is_function_calling_format_output,
    load_dataset_entry,
)

_FORMATS = {"simple_java": ReturnFormat.JAVA, "simple_javascript": ReturnFormat.JAVASCRIPT}
_LANGUAGES = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}
_fresh = itertools.count()


def answer(request: dict[str, Any]) -> Any:
    """True or False as the leaderboard judges; "crash: …" where its code raises; the prompt for kind "prompt"."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return {"calls": _calls, "turns": _turns, "prompts": _prompts}[request["kind"]](request)
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"[:200]


def _calls(request: dict[str, Any]) -> bool:
    """An answer's text in a single-turn category: eval_runner's steps."""
    category = request["category"]
    try:
        decoded = default_decode_ast_prompting(request["text"], _FORMATS.get(category, ReturnFormat.PYTHON))
    except Exception:
        return "irrelevance" in category
    if "relevance" in category:
        return is_empty_output(decoded) == ("irrelevance" in category)
    if not is_function_calling_format_output(decoded):
        return False
    language = _LANGUAGES.get(category, Language.PYTHON)
    return bool(ast_checker(request["functions"], decoded, request["expected"], language, category, "m")["valid"])


def _turns(request: dict[str, Any]) -> bool:
    """The answers of a conversation, per turn."""
    decoded: list[list[list[str]]] = []
    for answers in request["answers"]:
        steps = []
        for text in answers:
            with contextlib.suppress(Exception):
                calls = default_decode_execute_prompting(text)
                if not is_empty_execute_response(calls):
                    steps.append(calls)
        decoded.append(steps)
    if len(decoded) != len(request["expected"]):
        return False
    name = f"m{next(_fresh)}"  # instances of the tools are kept under the model's name
    return bool(multi_turn_checker(decoded, request["expected"], request["row"], "multi_turn_base", name)["valid"])


def _prompts(request: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Id -> the messages that a model without a tool interface is first shown, for a whole category."""
    rows = load_dataset_entry(request["category"])
    return {
        row["id"]: system_prompt_pre_processing_chat_model(row["question"][0], row["function"], row["id"])
        for row in rows
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
