"""The file of a training's checkpoint: weights and moments of the adapter in the safetensors format.

It is written as it is fetched from a GPU, piece by piece through a little pinned memory: neither is there a second copy
on the CPU, nor does the training, which goes on meanwhile, have to share its memory and its time with much. What is
read are pages of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cascade.errors import DataError
from cascade.tensor_header import tensor_header

STATE = "state.safetensors"
"""The file of a checkpoint."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_PIECE = 32 * 2**20
"""Bytes that are fetched from a GPU at once."""
_WEIGHTS, _MOMENT, _START = "weights", "moment.", "start."
"""Names of tensors in the file, or what they begin with."""


@dataclass(frozen=True)
class State:
    """What a training goes on from."""

    next_step: int
    updates: int
    """Steps that the optimiser has taken."""
    shapes: dict[str, tuple[int, ...]]
    """Of each parameter, in the order in which they are joined."""
    weights: torch.Tensor
    """Of all parameters, float32, shape (numbers,)."""
    moments: dict[str, torch.Tensor]
    """By AdamW's name of them, each as `weights`; none before the first update."""
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    """What PiSSA takes off again, by name of the parameter (bfloat16)."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name in the file."""
        named = {_WEIGHTS: self.weights} | {f"{_MOMENT}{key}": moment for key, moment in self.moments.items()}
        return named | {f"{_START}{name}": start for name, start in self.start.items()}


def joined(tensors: Sequence[torch.Tensor], *, stay: bool = True) -> torch.Tensor:
    """A copy of them all in float32, end to end: what they are now, whatever the next step makes of them.

    On their own device if it may stay there and that has room, else on the CPU.
    """
    if stay:
        with suppress(torch.OutOfMemoryError):
            return torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    return torch.cat([tensor.detach().cpu().float().flatten() for tensor in tensors])


def apart(tensor: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each that was joined."""
    parts = tensor.split([math.prod(shape) for shape in shapes.values()])
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        yield name, part.view(shape)


def write_state(state: State, folder: str | Path) -> None:
    """As the file of a checkpoint, which `read_state` reads. Another thread may go on training."""
    tensors = state.tensors()
    described = [(name, _DTYPES[t.dtype], t.shape, t.nbytes) for name, t in tensors.items()]
    numbers = {"next_step": state.next_step, "updates": state.updates, "shapes": state.shapes}
    header = tensor_header(described, {name: json.dumps(value) for name, value in numbers.items()})
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / STATE, "wb") as file:
        file.write(header)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                file.write(piece.data)


def _pieces(tensor: torch.Tensor) -> Iterator[NDArray[np.uint8]]:
    """Its bytes; each piece is good until the next is asked for.

    They come from a GPU on a stream beside the one that the training computes on, by way of pinned memory: while the
    driver copies to memory that may be paged out, no other thread's work reaches the GPU.
    """
    data = tensor.flatten().view(torch.uint8)
    if not data.is_cuda:
        yield data.numpy()
        return
    staged, stream = pinned(), torch.cuda.Stream(data.device)
    stream.wait_stream(torch.cuda.default_stream(data.device))  # it made the tensor
    for part in data.split(_PIECE):
        with torch.cuda.stream(stream):
            staged[: len(part)].copy_(part, non_blocking=True)
        stream.synchronize()
        yield staged[: len(part)].numpy()


def pinned() -> torch.Tensor:
    """Pinned memory for a piece; torch keeps it for the next time when it is no longer in use."""
    return torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)


def read_state(folder: str | Path) -> State:
    """What `write_state` wrote; its tensors are pages of the file.

    Raises:
        DataError: it is not there, not whole, or of another version.
    """
    path = Path(folder) / STATE
    if not path.exists():
        raise DataError(f"{folder} holds no {STATE}: it is no checkpoint of this version")
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            noted: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise DataError(f"{path} is not whole ({error})") from error
    if not {"next_step", "updates", "shapes"} <= noted.keys() or _WEIGHTS not in tensors:
        raise DataError(f"{path} is no checkpoint of this version")
    return State(
        next_step=int(noted["next_step"]),
        updates=int(noted["updates"]),
        shapes={name: tuple(shape) for name, shape in json.loads(noted["shapes"]).items()},
        weights=tensors[_WEIGHTS],
        moments=_beginning(_MOMENT, tensors),
        start=_beginning(_START, tensors),
    )


def _beginning(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
