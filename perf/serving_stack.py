"""The servers that perf/serving.py asks, each started in processes of its own and ended with its block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from serving_setup import DOMAINS, Setup

HERE = Path(__file__).parent
START_S = 400


class Server(str):
    """The address of a running server."""

    process: subprocess.Popen[bytes]

    def engines(self) -> list[int]:
        """Processes of the engine replicas."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [p.pid for p in found if "ServeReplica:cascade:engine" in " ".join(_command(p))]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def served(setup: Setup, threads: int, **arguments: object) -> Iterator[Server]:
    """Cascade as it is deployed."""
    port = free_port()
    given = {"threads": threads, **arguments}
    command = [sys.executable, "-m", "serve", str(setup.config), "--port", str(port)]
    command += [f"{name}={value}" for name, value in given.items()]
    with running(command, port) as server:
        yield server


@contextmanager
def served_plainly(setup: Setup, threads: int) -> Iterator[Server]:
    """perf/serving_plain.py."""
    port = free_port()
    adapters = [f"{d}={setup.peft[d]}" for d in DOMAINS]
    dtype = setup.base.dtype if setup.base.dtype != "auto" else "bfloat16"
    command = [sys.executable, str(HERE / "serving_plain.py"), setup.base.model, dtype, str(port), str(threads)]
    with running([*command, *adapters], port) as server:
        yield server


@contextmanager
def running(command: list[str], port: int) -> Iterator[Server]:
    """A server that listens on a port, once it answers."""
    server = Server(f"http://127.0.0.1:{port}")
    server.process = subprocess.Popen(command, stdout=sys.stderr, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        _wait(server)
        yield server
    finally:
        server.terminate()
        try:
            server.process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(server.process.pid).children(recursive=True):
                process.kill()
            server.process.kill()


def _wait(server: Server) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError("the server ended while it was starting; its output says why")
        try:
            if httpx.get(f"{server}/health", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server was not up after {START_S} s")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
