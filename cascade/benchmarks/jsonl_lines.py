"""The lines of users' own task files: what each kind of task must hold. See `cascade.benchmarks.jsonl`."""

from __future__ import annotations

import copy
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from cascade.benchmarks.unit_test_scripts import as_script
from cascade.benchmarks.unit_tests import names_under_test, require_python
from cascade.scoring.calls import PYTHON_TYPES
from cascade.scoring.fences import read_code, read_javascript
from cascade.tasks import Message, Split

ROLES = ("system", "user", "assistant")


class Line(BaseModel):
    """What all kinds have."""

    model_config = ConfigDict(extra="forbid")

    id: str | int
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    split: Split | None = None
    category: str = ""
    difficulty: int = Field(1, ge=1)
    max_tokens: int = Field(256, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _texts_are_whole(cls, line: Any) -> Any:
        for key, value in line.items() if isinstance(line, dict) else ():
            try:
                json.dumps(value, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{key} holds {error.object[error.start]!r}, one half of a character alone: write the character, "
                    "or both of its halves"
                ) from None
        return line

    @model_validator(mode="after")
    def _asks_something(self) -> Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages == []:
            raise ValueError("messages holds none")
        for message in self.messages or ():
            if set(message) != {"role", "content"}:
                raise ValueError("messages: each message has exactly the keys role and content")
            if message["role"] not in ROLES:
                raise ValueError(f"messages: there is no role {message['role']!r}; roles are {', '.join(ROLES)}")
        return self

    def conversation(self) -> list[Message]:
        if self.messages is not None:
            return [Message(**m) for m in self.messages]
        return [Message("user", self.prompt or "")]


def _no_bool(answer: Any) -> Any:
    if any(isinstance(a, bool) for a in (answer if isinstance(answer, list) else [answer])):
        raise ValueError('true and false would be taken for 1 and 0; give the text, e.g. "true"')
    return answer


class Exact(Line):
    kind: Literal["exact"]
    answer: Annotated[str | int | float | list[str | int | float], BeforeValidator(_no_bool)]

    @model_validator(mode="after")
    def _says_something(self) -> Exact:
        if not all(str(a).strip() for a in self.accepted()) or not self.accepted():
            raise ValueError("a blank answer would let an empty text pass")
        return self

    def accepted(self) -> list[str | int | float]:
        """The answers that pass."""
        return self.answer if isinstance(self.answer, list) else [self.answer]


class MultipleChoice(Line):
    kind: Literal["multiple_choice"]
    choices: list[str] = Field(min_length=2, max_length=26)
    answer: Annotated[int | str, BeforeValidator(_no_bool)]

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> MultipleChoice:
        self.index()
        return self

    def index(self) -> int:
        """Position of the right choice."""
        letters = [chr(65 + i) for i in range(len(self.choices))]
        if isinstance(self.answer, str):
            for names in (letters, self.choices):
                if self.answer in names:
                    return names.index(self.answer)
        elif 0 <= self.answer < len(self.choices):
            return self.answer
        raise ValueError(f"answer {self.answer!r} is no index, letter or text of the choices")


class UnitTests(Line):
    kind: Literal["unit_tests"]
    tests: str | list[str]
    setup: str = ""
    solution: str = ""
    defines: list[str] = []
    max_tokens: int = Field(512, gt=0)

    @field_validator("tests")
    @classmethod
    def _joined(cls, tests: str | list[str]) -> str:
        source = tests if isinstance(tests, str) else "\n".join(tests)
        require_python("tests", source)
        return as_script(source)

    @model_validator(mode="after")
    def _tests_can_be_passed(self) -> UnitTests:
        self.names()
        return self

    def names(self) -> list[str]:
        """What the answer must define."""
        return names_under_test(str(self.tests), self.setup, self.solution, self.defines)


class FunctionCase(BaseModel):
    model_config = ConfigDict(extra="forbid")

    args: list[Any]
    returns: Any


class Function(Line):
    kind: Literal["function"]
    language: Literal["python", "javascript"] = "python"
    function: str = Field(pattern=r"^[A-Za-z_$][\w$]*$")
    cases: list[FunctionCase] = Field(min_length=1)
    solution: str = ""
    max_tokens: int = Field(512, gt=0)

    @model_validator(mode="after")
    def _solution_defines_it(self) -> Function:
        read = read_code if self.language == "python" else read_javascript
        if self.solution and read(f"```\n{self.solution}\n```", self.function) is None:
            raise ValueError(f"the solution does not define {self.function}")
        return self


class Calls(Line):
    kind: Literal["calls"]
    functions: list[dict[str, Any]] = Field(min_length=1)
    expected: list[dict[str, dict[str, list[Any]]]]

    @model_validator(mode="after")
    def _functions_are_known(self) -> Calls:
        for function in self.functions:
            parameters = function.get("parameters")
            described = isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict)
            if not described or not isinstance(function.get("name"), str):
                raise ValueError("functions: each function needs name and parameters.properties; a name is a text")
            required = parameters.get("required", []) if isinstance(parameters, dict) else []
            if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
                raise ValueError(f"functions: parameters.required of {function['name']} must be a list of names")
        names = {f["name"] for f in self.functions}
        for call in self.expected:
            if len(call) != 1 or not set(call) <= names:
                raise ValueError(f"expected: each expected call names one of the functions {sorted(names)}")
        properties = {f["name"]: f["parameters"]["properties"] for f in self.functions_as_scored()}
        for call in self.expected:
            for name, values in call.items():
                for parameter, accepted in values.items():
                    _require_lists_in_objects(accepted, properties[name].get(parameter, {}), f"{parameter} of {name}")
        return self

    def functions_as_offered(self) -> list[dict[str, Any]]:
        """The functions as the endpoint describes a request's `tools`."""
        return [{key: f.get(key, "") for key in ("name", "description", "parameters")} for f in self.functions]

    def functions_as_scored(self) -> list[dict[str, Any]]:
        """The functions with the types of their parameters as `match_calls` names them."""
        functions = copy.deepcopy(self.functions)
        for function in functions:
            for name, schema in function["parameters"]["properties"].items():
                where = f"parameter {name} of {function['name']}"
                if not isinstance(schema, dict):
                    raise ValueError(f"{where} needs a schema: an object with its type")
                schema["type"] = _scored_type(schema.get("type"), where)
                if schema["type"] in ("array", "tuple"):
                    items = schema.get("items") or {}
                    if not isinstance(items, dict):
                        raise ValueError(f"items of {where} must be one schema for all: an object with its type")
                    schema["items"] = {**items, "type": _scored_type(items.get("type"), f"items of {where}")}
        return functions


def _require_lists_in_objects(accepted: list[Any], schema: dict[str, Any], where: str) -> None:
    """
    Raises:
        ValueError: an accepted object has a value itself where a list of accepted ones belongs.
    """
    if schema.get("type") == "array" and schema["items"]["type"] == "dict":
        accepted = [item for items in accepted if isinstance(items, list) for item in items]
    elif schema.get("type") != "dict":
        return
    for key, values in (pair for given in accepted if isinstance(given, dict) for pair in given.items()):
        if not isinstance(values, list):
            raise ValueError(
                f"parameter {where}: an accepted object holds a list of accepted values for each key, as in "
                f"{{{key!r}: [{values!r}]}}"
            )


def _scored_type(declared: Any, where: str) -> str:
    """A type of JSON Schema by BFCL's name for it."""
    known = {"number": "float", "object": "dict"} | {name: name for name in PYTHON_TYPES}
    if not isinstance(declared, str) or declared not in known:
        raise ValueError(f"{where} has the type {declared!r}; allowed are {', '.join(known)}")
    return known[declared]


class Open(Line):
    kind: Literal["open"]
    rubric: str = ""
    answer: str = ""


LINES: TypeAdapter[Any] = TypeAdapter(
    Annotated[Exact | MultipleChoice | UnitTests | Function | Calls | Open, Field(discriminator="kind")]
)
