"""What a recipe may say: the compression methods, their settings and the order in which they are applied."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cascade.compression.prune import Group, Scope
from cascade.compression.quantise import Codec
from cascade.compression.truncate import Allocation, Metric

Share = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Power = Annotated[float, Field(ge=0, le=4, allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of all parts of a recipe: immutable, no conversions, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Truncate(Settings):
    """Rank truncation by SVD (`cascade.compression.truncate`). Exactly one of `keep` and `energy`."""

    keep: Share | None = Field(None, description="share of the rank that is kept, so that it suits any rank")
    energy: Share | None = Field(None, description="share of each layer's squared singular values that is kept")
    allocation: Allocation = Field(
        "uniform", description="with keep: the same rank everywhere, the same energy, or where it is worth most"
    )
    metric: Metric = Field("weights", description="what counts: the matrix, its effect on outputs, or on the loss")

    @model_validator(mode="after")
    def _one_rule(self) -> Truncate:
        if (self.keep is None) == (self.energy is None):
            raise ValueError("set either keep or energy")
        if self.energy is not None and self.allocation != "uniform":
            raise ValueError(f"allocation: {self.allocation} goes with keep")
        return self


class Prune(Settings):
    """Pruning of A - A0 (of A where A0 is unknown) and of B (`cascade.compression.prune`)."""

    density_a: Share = Field(description="share of A's numbers that is kept; 0.12 is a sparsity of 88 %")
    density_b: Share
    metric: Metric = Field("weights", description="what counts: magnitude, the effect on outputs, or on the loss")
    scope: Scope = Field("global", description="how far one threshold reaches")
    weights: dict[Group, Factor] = Field({}, description="scope global: how many times larger a group's numbers count")
    rescale_a: Factor = Field(1.0, description="factor on what is kept of A's change")
    rescale_b: Factor = 1.0
    power_a: Power = Field(
        0.0,
        description="what is kept of A's change is divided besides, layer by layer, by its kept energy to this",
    )
    power_b: Power = 0.0

    @model_validator(mode="after")
    def _weights_are_global(self) -> Prune:
        if self.weights and self.scope != "global":
            raise ValueError("weights compare groups with each other: they go with scope: global")
        return self


class Recipe(Settings):
    """How an adapter is compressed: first truncated, then pruned, then quantised; each is optional.

    The empty recipe stores A - A0 and B dense in fp16.
    """

    truncate: Truncate | None = None
    prune: Prune | None = None
    values: Literal["fp16", "int8", "int4", "ternary"] = Field("fp16", description="what the kept numbers become")
    group: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = Field(
        64, description="numbers that share one fp16 scale"
    )

    @property
    def codec(self) -> Codec:
        """How values are packed: what pruning left is never 0, so that of ternary numbers the sign is enough."""
        return "sign" if self.values == "ternary" and self.prune else self.values
