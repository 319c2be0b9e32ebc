"""Whole programs and roles in a sandbox, with their standard input, output and error."""

from __future__ import annotations

import os
import selectors
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cascade.scoring.sandbox import STEP_S, Confined, Ended, Limits, Patience, SandboxError

_KEPT_OF_ERRORS = 1 << 14
NODE_BYTES = 96 << 20
"""What node takes for itself before a program has anything."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a program wrote, and how it ended.

    Attributes:
        text: its standard output, at most `Limits.output_bytes`.
        flooded: whether it wrote more, and was ended for it.
        errors: the last of its standard error.
    """

    text: str
    ended: Ended
    flooded: bool = False
    errors: str = ""

    @property
    def last_error(self) -> str:
        """The last line of standard error, which says what an exception was."""
        return (self.errors.strip().splitlines() or ["no message"])[-1][:300]


def run_program(argv: Sequence[str], stdin: str, limits: Limits) -> Output:
    """A program of the visible folders (node, say) with its standard input.

    Raises:
        SandboxError: see `Confined`.
    """
    return _run_with_streams(stdin, limits, argv=argv)


def run_python(code: str, stdin: str, limits: Limits) -> Output:
    """A Python program, run as `__main__`, with its standard input.

    Raises:
        SandboxError: see `Confined`.
    """
    return _run_with_streams(stdin, limits, roles=["program_role"], payload={"code": code})


def run_role(roles: Sequence[str], payload: dict[str, Any], limits: Limits) -> Output:
    """A role of this package (see `Confined`) that writes its answer to standard output.

    Raises:
        SandboxError: see `Confined`.
    """
    return _run_with_streams("", limits, roles=roles, payload=payload)


def run_javascript(code: str, stdin: str, limits: Limits) -> Output:
    """A JavaScript program under node, with its standard input. `limits.memory_bytes` is for all that it allocates, on
    the heap or in buffers; what node itself needs comes on top.

    Raises:
        SandboxError: node is not installed below /usr or /bin; or see `Confined`.
    """
    node = shutil.which("node", path="/usr/local/bin:/usr/bin:/bin")
    if node is None:
        raise SandboxError("JavaScript tasks need node below /usr/bin or /usr/local/bin")
    heap = f"--max-old-space-size={max(64, limits.memory_bytes >> 20)}"
    of_node = replace(limits, memory_bytes=0, data_bytes=limits.memory_bytes + NODE_BYTES)
    return run_program([node, heap, "--eval", code], stdin, of_node)


def _run_with_streams(
    stdin: str,
    limits: Limits,
    *,
    argv: Sequence[str] = (),
    roles: Sequence[str] = (),
    payload: dict[str, Any] | None = None,
) -> Output:
    with tempfile.TemporaryFile() as source:
        source.write(stdin.encode())
        source.seek(0)
        output, error = os.pipe(), os.pipe()
        with os.fdopen(output[0], "rb"), os.fdopen(error[0], "rb"):
            try:
                streams = (source.fileno(), output[1], error[1])
                confined = Confined(limits, argv=argv, roles=roles, payload=payload, streams=streams)
            finally:
                os.close(output[1])
                os.close(error[1])
            with confined:
                return _collect(output[0], error[0], confined, limits)


def _collect(output: int, error: int, confined: Confined, limits: Limits) -> Output:
    """Read until both streams end, output reaches its limit, or patience does."""
    chunks, size, complaints, patience = [], 0, b"", Patience(limits.wall, confined)
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        selector.register(error, selectors.EVENT_READ)
        while selector.get_map() and size <= limits.output_bytes and (left := patience.left()) > 0:
            for key, _ in selector.select(timeout=min(left, STEP_S)):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                elif key.fd == output:
                    chunks.append(chunk)
                    size += len(chunk)
                else:
                    complaints = (complaints + chunk)[-_KEPT_OF_ERRORS:]
    flooded = size > limits.output_bytes
    ended = confined.end() if flooded or patience.left() <= 0 else confined.wait()
    text = b"".join(chunks)[: limits.output_bytes].decode(errors="replace")
    return Output(text, ended, flooded, complaints.decode(errors="replace"))
