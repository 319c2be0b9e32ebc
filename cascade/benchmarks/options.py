"""Checking the `options` that a config gives to a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from cascade.config_sections import Section
from cascade.errors import ConfigError

Options = TypeVar("Options", bound=Section)


def parse_options(schema: type[Options], options: Mapping[str, Any], benchmark: str) -> Options:
    """The options as an instance of their schema.

    Raises:
        ConfigError: names every key that is unknown, missing or out of range, and the keys there are.
    """
    try:
        return schema.model_validate(dict(options))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "options"
            lines.append(f"  - {where}: {problem['msg'].removeprefix('Value error, ')}")
        allowed = ", ".join(schema.model_fields)
        raise ConfigError(
            f"options of the benchmark {benchmark} cannot be used (keys: {allowed}):\n" + "\n".join(lines)
        ) from None
