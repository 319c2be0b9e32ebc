"""The offline teacher: an OpenAI-compatible server on loopback that replays the tasks' own answer key.

It stands in for paid teachers where there is no key or no network, so that verification, escalation, ledger and
limits do real work. It is no measure of what a real teacher knows; its models' names start with "answer-key".

    python -m cascade.teachers.offline --key KEY.jsonl --teachers TEACHERS.json --port 0
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from cascade.config import Teacher
from cascade.errors import TeacherError
from cascade.tasks import Task
from cascade.teachers.answer_key import Replayer, make_key, read_key, write_key
from cascade.teachers.offline_app import OfflineModel, OfflineTeacher

_START_S = 60.0


@contextlib.contextmanager
def answer_key_server(
    tasks: Sequence[Task], teachers: Sequence[Teacher], seed: int, *, host: str = "127.0.0.1"
) -> Iterator[str]:
    """Run the offline teacher in a process of its own, which ends with this one, however this one ends.

    Args:
        tasks: what it knows the answers to; a prompt it does not know gets an "I do not know".
        teachers: all tiers of the config; those without `answer_key` are passed over.
        seed: decides which answers are wrong, and how.
        host: address to listen on; on a cluster, one that the other nodes reach.

    Yields:
        Its base URL, ending in /v1: what `TeacherClient` takes as `resolve={"answer-key": url}`.

    Raises:
        TeacherError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="answer-key-") as folder:
        key, models = Path(folder, "key.jsonl"), Path(folder, "teachers.json")
        write_key(make_key(tasks), key)
        models.write_text(json.dumps([m.model_dump(mode="json") for m in offline_models(teachers)]), encoding="utf-8")
        command = [sys.executable, "-m", "cascade.teachers.offline", "--key", str(key), "--teachers", str(models)]
        command += ["--seed", str(seed), "--host", host, "--port", "0"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
        try:
            yield _wait_until_ready(process, host)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def offline_models(teachers: Sequence[Teacher]) -> list[OfflineModel]:
    """The models that the server offers for the answer-key teachers of a config, each once."""
    models = {
        t.name: OfflineModel(
            name=t.name, ability=t.answer_key, requests_per_minute=sum(e.requests_per_minute for e in t.endpoints)
        )
        for t in teachers
        if t.answer_key is not None
    }
    return list(models.values())


def _environment() -> dict[str, str]:
    """This process's environment, with this very package on the child's path."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _wait_until_ready(process: subprocess.Popen[bytes], host: str) -> str:
    """The URL of the server, once it answers."""
    assert process.stdout is not None
    deadline = time.monotonic() + _START_S
    readable, _, _ = select.select([process.stdout], [], [], _START_S)
    line = process.stdout.readline() if readable else b""
    if not line.strip():
        raise TeacherError(f"the offline teacher did not start (exit status {process.poll()}); its errors are above")
    root = f"http://{host}:{int(line)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(f"{root}/health", timeout=5):
                return f"{root}/v1"
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise TeacherError(f"the offline teacher does not answer at {root}: {error}") from error
            time.sleep(0.02)


def serve(key: Path, teachers: Path, seed: int, host: str, port: int) -> None:
    """Serve until the process is ended; prints the port as the first line."""
    import uvicorn

    models = [OfflineModel.model_validate(m) for m in json.loads(teachers.read_text(encoding="utf-8"))]
    app = OfflineTeacher(Replayer(read_key(key), seed), models).app()
    listener = socket.create_server((host, port), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def _end_with_parent() -> None:
    """End this process when the pipe on stdin closes: its other end is held by the parent alone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the server process."""
    parser = argparse.ArgumentParser(prog="python -m cascade.teachers.offline", description=__doc__)
    parser.add_argument("--key", type=Path, required=True, help="answer key, one JSON line per task")
    parser.add_argument("--teachers", type=Path, required=True, help="JSON list of models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one; it is printed")
    options = parser.parse_args(arguments)
    _end_with_parent()
    serve(options.key, options.teachers, options.seed, options.host, options.port)


if __name__ == "__main__":
    main()
