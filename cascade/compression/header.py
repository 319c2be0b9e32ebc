"""What a modifier file says of itself, all that is not packed numbers, and how much of that is believed.

Up to version 1 the header is plain text in the metadata of the safetensors file; from version 2 on it is a stream of
its own, compressed as the others are, and the metadata says only the version, its length and the file's hash.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import Field, ValidationError, model_validator

from cascade.compression.methods import Recipe, Settings
from cascade.errors import FormatError
from cascade.scoring.statistics import Score

VERSION = 2
ZEROS = "0" * 64
MAX_TEXT = 4 << 20
"""Longest header, in bytes."""
_MAX_LAYERS = 1 << 14
_MAX_BRACKETS, _MAX_COMMAS = 1 << 15, 1 << 18
"""Of a header of so many layers, generously: a few bytes of JSON can become a hundred in memory."""
_MAX_FACTOR = 1 << 25
"""Numbers of A or of B of one layer: twice those of an output head of 128,000 tokens at rank 128."""
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
"""Between which float32 has all its digits."""

_Features = Annotated[int, Field(ge=1, le=1 << 24)]
_Rank = Annotated[int, Field(ge=1, le=1 << 16)]
_Count = Annotated[int, Field(ge=0)]
_Exponent = Annotated[int, Field(ge=-200, le=200)]
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Row = tuple[_Name, _Rank, _Features, _Features, _Count, _Count, _Exponent, _Exponent]
"""Name, rank, inputs, outputs, kept numbers of A and B, exponents of A and B of one layer."""


class Base(Settings):
    """The model that a modifier fits; the hash is empty where unknown."""

    name: str
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")


class Header(Settings):
    """The header of a modifier file."""

    format: Literal["cascade-modifier"] = "cascade-modifier"
    version: int = VERSION
    base: Base
    recipe: Recipe
    rank: _Rank
    scaling: float = Field(allow_inf_nan=False)
    target_modules: list[str] = Field(max_length=_MAX_LAYERS)
    init_seed: int | None
    layers: list[_Row] = Field(min_length=1, max_length=_MAX_LAYERS)
    raw_bytes: dict[str, int] = Field(description="length of each stream that is stored compressed, once opened")
    scores: dict[str, Score]
    teachers: list[str] = Field(description="who wrote the training answers; 'answer-key…' replays known ones")
    expanded_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    sha256: str = Field(ZEROS, pattern=r"^[0-9a-f]{64}$", description="of the file; in the metadata since version 2")

    @model_validator(mode="after")
    def _makes_sense(self) -> Header:
        if not _SMALLEST <= abs(self.scaling) <= _LARGEST:
            raise ValueError(f"scaling {self.scaling} is no number that float32 holds")
        if len({name for name, *_ in self.layers}) != len(self.layers):
            raise ValueError("a layer is there twice")
        for name, rank, fan_in, fan_out, kept_a, kept_b, _, _ in self.layers:
            # Adapters whose layers differ could be written in version 1 with the rank of the others.
            if rank > self.rank and self.version > 1:
                raise ValueError(f"layer {name} has rank {rank}, more than the adapter ({self.rank})")
            if rank * max(fan_in, fan_out) > _MAX_FACTOR:
                raise ValueError(f"layer {name} has more than {_MAX_FACTOR} numbers in a factor")
            if kept_a > rank * fan_in or kept_b > rank * fan_out:
                raise ValueError(f"layer {name} keeps more numbers than it has")
        return self

    def text(self) -> bytes:
        """As it is written in a file of the present version."""
        return self.model_dump_json(exclude={"format", "version", "sha256"}).encode()


class Envelope(Settings):
    """The metadata of a file since version 2: what must be known before its header is opened.

    Attributes:
        header_bytes: the header's length once opened.
    """

    format: Literal["cascade-modifier"] = "cascade-modifier"
    version: int = VERSION
    header_bytes: int = Field(ge=2, le=MAX_TEXT)
    sha256: str = Field(ZEROS, pattern=r"^[0-9a-f]{64}$")


Part = TypeVar("Part", Header, Envelope)


def version_of(metadata: str) -> int:
    """The version that a file's metadata says.

    Raises:
        FormatError: it says none, or one that is newer than this code.
    """
    version = strict_json(metadata).get("version")
    if type(version) is not int or version < 1:
        raise FormatError("its header has no version")
    if version > VERSION:
        raise FormatError(f"written in format version {version}, this Cascade reads up to {VERSION}: update it")
    return version


def checked(kind: type[Part], text: bytes | str) -> Part:
    """
    Raises:
        FormatError: the text is none of the kind.
    """
    strict_json(text)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise FormatError(f"its header is wrong{in_words(error)}") from None


def in_words(error: ValidationError) -> str:
    """Where a header is wrong, and why."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{f' at {place}' if place else ''}: {first['msg'].removeprefix('Value error, ')[:400]}"


def strict_json(text: bytes | str) -> dict[str, Any]:
    """A JSON object in which nothing is twice, of no more parts than a header has.

    Raises:
        FormatError: the text is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise FormatError("its header names something twice")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"its header holds {constant}")

    raw = text.encode() if isinstance(text, str) else text
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS or raw.count(b",") > _MAX_COMMAS:
        raise FormatError("its header has more parts than any adapter")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header is no JSON that can be read: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise FormatError("its header is no JSON object")
    return value
