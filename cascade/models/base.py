"""Loading the base model, ready to generate or to be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cascade.config import Base, Weights
from cascade.errors import ConfigError
from cascade.models.attention import enable_sharing
from cascade.models.bits import keep_to_sound_kernels, quantization
from cascade.models.files import base_folder, context_in, sha256_of_weights
from cascade.models.int8 import hold_in_int8


@dataclass(frozen=True)
class LoadedBase:
    """A base model in memory, ready to generate.

    Attributes:
        name: as the config names it.
        sha256: over the weight files, in whatever numbers they are held; a modifier fits the base that it was trained
            on and no other.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    sha256: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its answer together, None where the base sets no limit.

        Positions beyond were never trained; where they are looked up in a table, there are none.
        """
        return context_in(self.model.config)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies in it, float32 elsewhere."""
    if dtype != "auto":
        resolved: torch.dtype = getattr(torch, dtype)
        return resolved
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def check_weights(weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """
    Raises:
        ConfigError: a base of this dtype cannot be held so on the device.
    """
    if weights == "int8" and (device.type != "cpu" or dtype != torch.bfloat16):
        raise ConfigError(
            f"serving.weights: int8 is for CPUs and a base in bfloat16, not {dtype} on {device.type}: set base.dtype: "
            "bfloat16, or serving.weights: full"
        )


def default_device() -> torch.device:
    """The GPU if this process was given one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_to_share(share: float) -> None:
    """Let this process take no more than a share of its GPU's memory, where others compute on the same one."""
    if share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


@contextmanager
def named_when_full(what: str, remedy: str) -> Iterator[None]:
    """Say what did not fit and what to change where a GPU's memory ends.

    Raises:
        ConfigError: it ended inside.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # the second: others left not even the driver any
        if "out of memory" not in str(error):
            raise
        raise ConfigError(f"the GPU's memory does not do for {what}: {remedy} ({error})") from error


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """A base's tokenizer alone.

    Raises:
        ConfigError: see `base_folder`; also if there is none, or it has no chat template or no end token.
    """
    folder = base_folder(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"base.model: {folder} holds no tokenizer: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(f"base.model: {base.model} has no chat template; use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"base.model: the tokenizer of {base.model} names no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: Base, device: torch.device | None = None, weights: Weights = "full", bits: Literal[16, 8, 4] = 16
) -> LoadedBase:
    """Load model and tokenizer for inference (evaluation mode, gradients off).

    Args:
        weights: see `cascade.config.Serving`.
        bits: of a base that a LoRA is trained on, see `cascade.config.Training.base_bits`.

    Raises:
        ConfigError: see `base_folder` and `load_tokenizer`; also if the folder holds something else than a causal
            language model, or not all of its weights, or if its numbers cannot be held so.
        DataError: the folder holds no safetensors.
    """
    device = device or default_device()
    dtype = resolve_dtype(base.dtype, device)
    check_weights(weights, dtype, device)
    packed = {} if bits == 16 else quantization(bits, dtype, device)
    folder = base_folder(base)
    sha256 = sha256_of_weights(folder)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **packed
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"base.model: {folder} is no causal language model: {error}") from error
    model: PreTrainedModel = found[0]
    _require_all_weights(folder, found[1])
    tokenizer = load_tokenizer(base)
    if bits == 16:  # others were put there as they were packed
        with named_when_full(
            "the base", "fewer actors, or execution.student_tokens for each of them, leave others room"
        ):
            model.to(device)  # type: ignore[arg-type]
    elif bits == 4 and device.type == "cpu":
        keep_to_sound_kernels(model)
    model.eval().requires_grad_(False)
    enable_sharing(model)
    if weights == "int8":
        hold_in_int8(model)
    return LoadedBase(model, tokenizer, base.model, sha256)


def _require_all_weights(folder: Path, info: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: weights of the model are not in its files, so that they are random.
    """
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if lacking:
        unknown = sorted(info["unexpected_keys"])
        there = f"; they hold {unknown[0]}, …, which it does not know" if unknown else ""
        raise ConfigError(
            f"base.model: the files in {folder} lack weights of the model, or have them in another shape: "
            f"{', '.join(sorted(lacking)[:3])} ({len(lacking)} in all){there}. Get the base anew; of a base with an "
            "adapter on it, save the merged model"
        )


def end_token_ids(loaded: LoadedBase) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's and those of the generation config."""
    ids = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in [*listed, loaded.tokenizer.eos_token_id] if i is not None)
