"""The bill of a whole system: what base, modifiers and router weigh on disk, and what serving holds of them.

Disk is what the files weigh. Resident is the weights that one serving process holds: the base, room for the largest
modifier in its serving form as often as `serving.max_loaded_modifiers` says (there being as many), and the router; base
and modifiers as `serving.weights` says.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from cascade import modifiers
from cascade.bundles import BUNDLE_CONFIG, BUNDLE_MANIFEST
from cascade.compression.flat import layout_of
from cascade.config import Config
from cascade.errors import ConfigError, DataError
from cascade.fingerprints import sha256_of_file
from cascade.models.base import check_weights, default_device, resolve_dtype
from cascade.models.files import base_folder, base_sha256
from cascade.models.int8 import hold_in_int8
from cascade.routing.model import load_current, local_folder
from cascade.store import Store


@dataclass(frozen=True)
class Item:
    """One part of the system.

    Attributes:
        kind: "base", "modifier" or "router".
        resident_bytes: of its weights while it is served.
    """

    kind: str
    name: str
    version: str
    sha256: str
    disk_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class Bill:
    """All parts, and what they come to.

    Attributes:
        loaded: modifiers that are in memory together.
    """

    items: tuple[Item, ...]
    loaded: int = 1

    @property
    def disk_bytes(self) -> int:
        return sum(item.disk_bytes for item in self.items)

    @property
    def resident_bytes(self) -> int:
        """Base, router, and room for the modifiers that are in memory together, any of which may be the largest."""
        one = max((i.resident_bytes for i in self.items if i.kind == "modifier"), default=0)
        return sum(i.resident_bytes for i in self.items if i.kind != "modifier") + self.loaded * one


def bill(config: Config, cache: Path) -> Bill:
    """Measure the system that a config's storage holds.

    Args:
        cache: local folder for copies of files from an object store.

    Raises:
        ConfigError: there is nothing to serve yet, or the base cannot be had.
        FormatError: a modifier or the router is damaged.
    """
    store, dtype = Store(config.storage), resolve_dtype(config.base.dtype, default_device())
    items = [_base(config, dtype)]
    for domain in modifiers.list_domains(store):
        found = modifiers.current(store, domain)
        if found is not None:
            content = modifiers.load(store, found, verify=False)
            resident = layout_of(content, dtype, config.serving.weights == "int8").nbytes
            items.append(Item("modifier", domain, found.version, found.sha256, found.disk_bytes, resident))
    if len(items) == 1:
        raise ConfigError(f"there is no modifier in {store.uri} yet: run the pipeline first")
    router = load_current(store, cache)  # which sees that it is whole
    if router is not None:
        version = router[0]
        folder = local_folder(store, version, cache)
        size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
        weights = folder / "router.safetensors"
        items.append(Item("router", "router", version, sha256_of_file(weights), size, weights.stat().st_size))
    loaded = min(config.serving.max_loaded_modifiers, sum(item.kind == "modifier" for item in items))
    return Bill(tuple(items), loaded)


def bundle(config: Config, target: Path, cache: Path) -> Path:
    """Pack base, current modifiers and router into one folder that serving runs from.

    The folder holds `base/`, `storage/`, a manifest with every file's hash, and a config for `python -m serve`.

    Raises:
        DataError: the target exists and is not empty.
        ConfigError, FormatError: see `bill`.
    """
    if target.exists() and any(target.iterdir()):
        raise DataError(f"{target} exists and is not empty: give a new folder")
    found, store = bill(config, cache), Store(config.storage)
    shutil.copytree(base_folder(config.base), target / "base", dirs_exist_ok=True)
    packed = Store(str(target / "storage"))
    for item in found.items:
        if item.kind == "modifier":
            folder = f"{modifiers.FOLDER}/{item.name}/{item.version}"
            for name in store.list(folder):
                packed.write_bytes(f"{folder}/{name}", store.read_bytes(f"{folder}/{name}"))
            modifiers.set_current(packed, item.name, item.version)
        elif item.kind == "router":
            shutil.copytree(local_folder(store, item.version, cache), target / "storage" / "router" / item.version)
            packed.write_bytes("router/CURRENT", f"{item.version}\n".encode())
    settings = config.model_dump(mode="json")
    settings |= {"base": {"model": "base", "dtype": config.base.dtype}, "storage": "storage"}
    (target / BUNDLE_CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    files = sorted(f for f in target.rglob("*") if f.is_file())
    manifest = {
        "items": [item.__dict__ for item in found.items],
        "disk_bytes": found.disk_bytes,
        "resident_bytes": found.resident_bytes,
        "files": {str(f.relative_to(target)): sha256_of_file(f) for f in files},
    }
    (target / BUNDLE_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return target


def _base(config: Config, dtype: torch.dtype) -> Item:
    base, weights = config.base, config.serving.weights
    check_weights(weights, dtype, default_device())
    folder = base_folder(base)
    disk = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    with torch.device("meta"):  # shapes alone
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    if weights == "int8":
        hold_in_int8(model)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return Item("base", base.model, base.revision or "", base_sha256(base), disk, held)
