"""`adapter_config.json` of a PEFT folder, as far as it decides what a LoRA means."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cascade.errors import DataError

CONFIG_FILE = "adapter_config.json"
_REFUSED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
    "megatron_config",
)
"""Settings of a PEFT LoRA that make it more than `scaling * B @ A` on linear layers."""
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways to start a LoRA, beside the usual ones, that leave the base as it is."""
_Rank = Annotated[int, Field(ge=1, le=1 << 16)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]


class PeftConfig(BaseModel):
    """The settings of one LoRA, with PEFT's defaults."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: str
    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    exclude_modules: Any = None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _compiles(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in patterns or {}:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern[:80]!r} is no pattern of names: {error}") from None
        return patterns

    @field_validator("alpha_pattern")
    @classmethod
    def _matches_in_linear_time(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in patterns or {}:
            try:
                _matches(pattern, pa.array([""]))
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"{pattern[:80]!r} cannot be matched in a time that is bounded ({str(error)[:120]}): write it "
                    "without what looks around or back, and counts of at most 1000, or name the modules one by one"
                ) from None
        return patterns

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """The config of a folder.

        Raises:
            DataError: it is missing or wrong, or of an adapter that is more than plain LoRA on linear layers.
        """
        path = folder / CONFIG_FILE
        raw = read_json(path)
        if raw.get("peft_type") != "LORA":
            raise DataError(f"{folder} holds a {raw.get('peft_type')} adapter; only LORA can be compressed")
        try:
            config = cls.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{path} is wrong at {'.'.join(map(str, first['loc']))}: {first['msg'][:300]}") from None
        used = [name for name in _REFUSED if raw.get(name)] + ["bias"] * (config.bias != "none")
        if used:
            raise DataError(f"{folder} uses {', '.join(used)}; only plain LoRA on linear layers can be compressed")
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower() not in _HARMLESS_STARTS:
            raise DataError(
                f"{folder} was started as {start}, which may change the base's own weights: what it holds is no LoRA "
                "on the base as it is. Convert it first: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            )
        return config

    def scaling(self) -> float:
        """What PEFT multiplies B @ A with in most layers.

        Raises:
            DataError: it is zero or no number.
        """
        return self._scaling(self.lora_alpha, self.r)

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """The same in each layer, whose own alpha counts if it has one.

        Args:
            ranks: by the layers' names.

        Raises:
            DataError: one is zero or no number.
        """
        alphas = dict.fromkeys(ranks, self.lora_alpha)
        names = pa.array(list(ranks), pa.string())
        for pattern, alpha in reversed((self.alpha_pattern or {}).items()):  # of several that match the first counts
            alphas |= dict.fromkeys(names.filter(_matches(pattern, names)).to_pylist(), alpha)
        return {name: self._scaling(alphas[name], rank) for name, rank in ranks.items()}

    def _scaling(self, alpha: float, rank: int) -> float:
        scaling = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        if not math.isfinite(scaling) or scaling == 0:
            raise DataError(f"lora_alpha {alpha} with rank {rank} gives no usable scaling")
        return scaling

    def targets(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """The adapted modules as a list of names; full names are names too, and say exactly which layers are meant."""
        some = self.layers_to_transform not in (None, [])  # 0 is one, too
        narrowed = some or self.layers_pattern or self.exclude_modules
        if isinstance(self.target_modules, list) and self.target_modules and not narrowed:
            return tuple(sorted(self.target_modules))
        return layers


def _matches(pattern: str, names: pa.Array) -> pa.BooleanArray:
    """Whether a pattern matches the end of each module's name, as in PEFT.

    By RE2, in time linear in the name's length: with `re`, a pattern from elsewhere could take for ever.

    Raises:
        pa.ArrowInvalid: the pattern is none of RE2's.
    """
    return pc.match_substring_regex(names, rf"^(.*\.)?({pattern})$")


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        DataError: there is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: give the folder of a PEFT LoRA adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object")
    return value
