"""What compression did to one adapter: layer by layer, and stage by stage."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cascade.compression.adapter import AdapterWeights
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.methods import Recipe

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(?:.*\.)?(?P<module>[^.]+)$")


@dataclass(frozen=True, slots=True)
class LayerShare:
    """What is left of one layer.

    Attributes:
        block: the transformer block's number; -1 for a layer outside of the blocks.
        module: what it is there, e.g. "q_proj".
        full_rank: that the adapter was trained with; rank: what truncation left.
        density_a, density_b: share of the numbers of A and of B, at that rank, that pruning kept.
    """

    block: int
    module: str
    full_rank: int
    rank: int
    density_a: float
    density_b: float


@dataclass(frozen=True, slots=True)
class StageCost:
    """How large the adapter is after a stage of its compression, and what it still knows.

    Attributes:
        stage: "trained", "truncated", "pruned", "quantised" ("fp16" where no other did anything) or "recovered".
        disk_bytes: of the file, header included: fp16 safetensors for "trained", else a modifier file.
        resident_bytes: what serving would hold.
        loss: mean held-out loss per target token, nats.
    """

    stage: str
    disk_bytes: int
    resident_bytes: int
    loss: float


def layer_shares(adapter: AdapterWeights, compressed: CompressedAdapter) -> list[LayerShare]:
    """Per layer of an adapter, what its compressed form has left of it; in the adapter's order."""
    found = []
    for spec in compressed.layers:
        place = _BLOCK.search(spec.name)
        block, module = (int(place[1]), place["module"]) if place else (-1, spec.name.rsplit(".", 1)[-1])
        densities = (spec.kept[0] / spec.size("a"), spec.kept[1] / spec.size("b"))
        found.append(LayerShare(block, module, adapter.layers[spec.name].rank, spec.rank, *densities))
    return found


def stages_of(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The recipe cut off after each of its stages that does something; the last one is the whole recipe.

    Before the last, numbers are fp16: what a stage saves is told apart from what fewer bits save.
    """
    stages = []
    if recipe.truncate is not None and (recipe.truncate.keep or 0.0) < 1:
        stages.append(("truncated", Recipe(truncate=recipe.truncate)))
    if recipe.prune is not None:
        stages.append(("pruned", Recipe(truncate=recipe.truncate, prune=recipe.prune)))
    if recipe.values != "fp16" or not stages:
        stages.append(("quantised" if recipe.values != "fp16" else "fp16", recipe))
    return stages
