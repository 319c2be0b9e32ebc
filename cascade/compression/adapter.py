"""The LoRA of one model in memory, and its way from and to an ordinary PEFT folder.

A PEFT folder that Cascade's own training wrote also holds `cascade_adapter.json` with the seed that A was started
from and the base's name and hash. With the seed, compression works on A - A0, the change that training made;
a folder from elsewhere has no such file and A itself is compressed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cascade.compression.peft_config import CONFIG_FILE, PeftConfig, read_json
from cascade.errors import DataError
from cascade.tensor_header import tensor_header
from cascade.training.seeded_init import initial_lora_a

WEIGHTS_FILE = "adapter_model.safetensors"
CASCADE_FILE = "cascade_adapter.json"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The base model that an adapter fits.

    Attributes:
        name: hub name or folder, as a person would write it.
        sha256: of its weights (hex), "" where unknown.
    """

    name: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two factors of one layer: its output changes by `scaling * b @ a @ x`.

    Attributes:
        a: float32 or float16, shape (rank, in features).
        b: the same type, shape (out features, rank).
    """

    a: NDArray[Any]
    b: NDArray[Any]

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A LoRA adapter: the factors of each adapted layer and what is needed to use them.

    Attributes:
        layers: by module name without PEFT's prefix, e.g. "model.layers.3.self_attn.q_proj". Ranks may differ.
        scaling: alpha / rank, one for all layers.
        rank: the rank it was trained with.
        base: the model it fits.
        target_modules: as in PEFT's config, e.g. ("q_proj", "v_proj").
        init_seed: seed of A's start in every layer (`cascade.training.seeded_init`), None where unknown.
    """

    layers: Mapping[str, LoraPair]
    scaling: float
    rank: int
    base: BaseRef
    target_modules: tuple[str, ...]
    init_seed: int | None = None

    def __post_init__(self) -> None:
        if not 2.0**-126 <= abs(self.scaling) <= 2.0**127:
            raise DataError(f"the adapter's scaling is {self.scaling}, which is no number that float32 holds")
        for name, pair in self.layers.items():
            if pair.a.ndim != 2 or pair.b.ndim != 2 or pair.a.shape[0] != pair.b.shape[1] or not pair.a.size:
                raise DataError(f"layer {name}: A {pair.a.shape} and B {pair.b.shape} are no (rank, in), (out, rank)")

    @property
    def parameters(self) -> int:
        """Numbers in all factors together."""
        return sum(pair.a.size + pair.b.size for pair in self.layers.values())

    def start(self, name: str) -> NDArray[np.float32] | None:
        """A0 of a layer, float32 of A's shape; None where the seed is unknown."""
        if self.init_seed is None:
            return None
        rank, fan_in = self.layers[name].a.shape
        return initial_lora_a(self.init_seed, name, rank, fan_in)


def fp16_bytes(adapter: AdapterWeights) -> int:
    """What `adapter_model.safetensors` of this adapter weighs in fp16, to the byte, header included."""
    named = sorted(_named_tensors(adapter))
    tensors = [(key, "F16", array.shape, 2 * array.size) for key, array in named]
    return len(tensor_header(tensors, {"format": "pt"})) + sum(size for *_, size in tensors)


def save_peft_folder(adapter: AdapterWeights, path: str | os.PathLike[str], *, dtype: str = "float32") -> Path:
    """Write an ordinary PEFT folder, which stock PEFT loads.

    Args:
        dtype: "float32" keeps every bit; "float16" is half the size.

    Raises:
        DataError: the dtype is neither.
    """
    if dtype not in ("float32", "float16"):
        raise DataError(f"adapters are written in float32 or float16, not {dtype!r}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.ascontiguousarray(array, dtype=dtype) for key, array in _named_tensors(adapter)}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / CONFIG_FILE, _peft_config(adapter))
    base = {"name": adapter.base.name, "sha256": adapter.base.sha256}
    _write_json(folder / CASCADE_FILE, {"init_seed": adapter.init_seed, "base": base})
    return folder


def load_peft_folder(path: str | os.PathLike[str], *, base: BaseRef | None = None) -> AdapterWeights:
    """Read a LoRA adapter from a PEFT folder, made by Cascade or elsewhere.

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`; `cascade_adapter.json` is optional.
        base: which base it fits, for folders that do not say.

    Returns:
        The adapter; float16 files stay float16, everything else becomes float32.

    Raises:
        DataError: a file is missing or broken, or the adapter is more than plain LoRA on linear layers.
    """
    folder = Path(path)
    config = PeftConfig.read(folder)
    pairs = _read_pairs(folder / WEIGHTS_FILE)
    scaling, layers = config.scaling(), {}
    scalings = config.scalings({name: pair.rank for name, pair in pairs.items()})
    for name, pair in pairs.items():
        own = scalings[name]
        # One scaling for all: a layer with another keeps its effect in B.
        same = math.isclose(own, scaling, rel_tol=1e-12)
        layers[name] = pair if same else LoraPair(pair.a, pair.b.astype(np.float32) * np.float32(own / scaling))
    seed, written_base = _read_origin(folder)
    return AdapterWeights(
        layers=layers,
        scaling=scaling,
        rank=max(config.r, *(pair.rank for pair in layers.values())),
        base=base or written_base or BaseRef(config.base_model_name_or_path or ""),
        target_modules=config.targets(tuple(layers)),
        init_seed=seed,
    )


# ------------------------------------------------------------------------------------------------- PEFT's side


def _named_tensors(adapter: AdapterWeights) -> Iterable[tuple[str, NDArray[Any]]]:
    for name, pair in adapter.layers.items():
        yield f"{_PREFIX}{name}.lora_A.weight", pair.a
        yield f"{_PREFIX}{name}.lora_B.weight", pair.b


def _peft_config(adapter: AdapterWeights) -> dict[str, Any]:
    # PEFT divides a layer's alpha by that layer's rank, so both patterns go together. A longer name comes first,
    # for PEFT takes the first pattern that is a suffix of a module's name.
    odd = {n: p.rank for n, p in adapter.layers.items() if p.rank != adapter.rank}
    odd = dict(sorted(odd.items(), key=lambda item: (-len(item[0]), item[0])))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.name or None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": _tidy(adapter.scaling * adapter.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.target_modules),
        "rank_pattern": odd,
        "alpha_pattern": {name: _tidy(adapter.scaling * rank) for name, rank in odd.items()},
    }


def _tidy(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _read_pairs(path: Path) -> dict[str, LoraPair]:
    factors: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                match = _KEY.fullmatch(key)
                if not match:
                    raise DataError(f"{path}: {key} is no LoRA factor of a linear layer{_remedy(key)}")
                tensor = file.get_tensor(key)
                if not tensor.is_floating_point():
                    raise DataError(f"{path}: {key} holds {tensor.dtype}, which are no numbers of a LoRA")
                array = tensor.numpy() if str(tensor.dtype) == "torch.float16" else tensor.float().numpy()
                factors.setdefault(match["layer"], {})[match["factor"]] = array
    except FileNotFoundError:
        raise DataError(f"{path} is missing: save the adapter with safe_serialization=True") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    lone = [name for name, pair in factors.items() if len(pair) != 2]
    if lone or not factors:
        raise DataError(f"{path}: {'no LoRA factors' if not factors else f'one factor is missing for {lone[:3]}'}")
    return {name: LoraPair(pair["A"], pair["B"]) for name, pair in sorted(factors.items(), key=_natural)}


def _remedy(key: str) -> str:
    """PEFT writes the base's own embedding or head beside a LoRA of it, changed or not."""
    if not key.endswith(".base_layer.weight"):
        return ""
    return " but a weight of the base: if that is as it was, save with save_pretrained(…, save_embedding_layers=False)"


def _natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in item[0].split(".")]


def _read_origin(folder: Path) -> tuple[int | None, BaseRef | None]:
    path = folder / CASCADE_FILE
    if not path.exists():
        return None, None
    origin = read_json(path)
    seed, base = origin.get("init_seed"), origin.get("base") or {}
    if not (seed is None or type(seed) is int) or not isinstance(base, dict):
        raise DataError(f'{path} must hold {{"init_seed": integer or null, "base": {{"name": …, "sha256": …}}}}')
    return seed, BaseRef(str(base.get("name", "")), str(base.get("sha256", "")))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
