"""Serving forms of modifiers on this machine: expanded once per version, checked, and kept open."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from cascade import modifiers
from cascade.compression.compressed import CompressedAdapter
from cascade.compression.flat import FlatAdapter, open_flat, save_flat
from cascade.errors import FormatError
from cascade.models.threads import alone
from cascade.modifiers import Modifier
from cascade.store import Store

_KEPT_S = 30 * 86_400
"""Forms that nobody opened for so long are removed from the cache."""


class Forms:
    """Opens modifiers as flat files, through a local cache that many replicas may share.

    Args:
        base_sha256: of the base that modifiers must have been made for.
        dtype: that the slot computes in.
        int8: whether the slot's numbers are in 8 bits.
        check: raises DataError for an adapter that does not fit the model.
        cache: local folder; a form's name there is the hash of the modifier file that it was expanded from.
        pin: see `open_flat`.
    """

    def __init__(
        self,
        store: Store,
        cache: Path,
        *,
        base_sha256: str,
        dtype: torch.dtype,
        check: Callable[[FlatAdapter | CompressedAdapter], None],
        int8: bool = False,
        pin: bool = False,
    ) -> None:
        self._store, self._cache = store, cache
        self._base_sha256, self._dtype, self._int8, self._check, self._pin = base_sha256, dtype, int8, check, pin

    def open(self, modifier: Modifier) -> FlatAdapter:
        """The form of a version, expanded first if this machine has not got it.

        Raises:
            DataError: the modifier's file is missing, or it does not fit the model.
            FormatError: it is damaged, swapped, or made for another base.
        """
        kind = "int8" if self._int8 else str(self._dtype).removeprefix("torch.")
        path = self._cache / f"{modifier.sha256}.{kind}.safetensors"
        self._cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            try:
                form = open_flat(path, pin=self._pin)
            except FormatError:  # not there yet, or damaged
                content = modifiers.load(self._store, modifier, base_sha256=self._base_sha256)
                self._check(content)  # before anything of the size that it says is made
                with alone():
                    save_flat(path, content, self._dtype, self._int8)
                form = open_flat(path, pin=self._pin)
            path.touch()
        if form.base.sha256 != self._base_sha256:
            raise FormatError(f"{modifier.name} was made for the base {form.base.name}, not for the one in use")
        self._check(form)
        return form

    def remove_old(self) -> None:
        """Remove forms from the cache that have not been opened for a month."""
        for path in self._cache.glob("*.safetensors"):
            if time.time() - path.stat().st_mtime > _KEPT_S:
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
