"""What every section of the configuration is, and how its errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Usd = Annotated[float, Field(ge=0)]
Weights = Literal["full", "int8"]
"""In what numbers a base's weights are held: those of its dtype, or 8 bits."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, numbers finite and no booleans."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        types = list(_types_in(cls.model_fields[info.field_name or ""].annotation))
        given = [value, *(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())]
        number = (int in types or float in types) and bool not in types and Any not in types
        if number and any(isinstance(v, bool) for v in given):
            raise ValueError("true and false are no numbers: write the number")
        return value


def _types_in(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of, e.g. `dict[str, float] | None` of str, float and None's type."""
    parts = get_args(annotation)
    yield from (found for part in parts for found in _types_in(part)) if parts else [annotation]


def explain(error: dict[str, Any], root: type[Section]) -> str:
    """One error of pydantic's in the words of the YAML file: the key, and what is allowed there."""
    where = ".".join(str(part) for part in error["loc"]) or "the whole file"
    if error["type"] == "extra_forbidden":
        section = _section_at(root, error["loc"][:-1])
        allowed = f"; allowed here: {', '.join(section.model_fields)}" if section else ""
        return f"{where}: unknown key{allowed}"
    if error["type"] == "missing":
        return f"{where}: is required"
    got = "" if isinstance(error.get("input"), dict | list) else f" (got {error.get('input')!r})"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{got}"


def _section_at(root: type[Section], location: tuple[int | str, ...]) -> type[Section] | None:
    """The section class that a location in the config belongs to."""
    section: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        if not (isinstance(section, type) and issubclass(section, BaseModel)) or part not in section.model_fields:
            return None
        section = _section_in(section.model_fields[part].annotation)
    return section if isinstance(section, type) and issubclass(section, Section) else None


def _section_in(annotation: Any) -> Any:
    """The section class inside `X`, `X | None`, `list[X]`."""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation
    return next((s for a in getattr(annotation, "__args__", ()) if (s := _section_in(a)) and s is not type(None)), None)
