"""`python -m serve CONFIG [--host HOST] [--port PORT] [name=value …]`: serve, until told to stop, cutting no answer.

Starts a Ray of its own, or joins the one that RAY_ADDRESS names. On SIGTERM or Ctrl-C no new request is let in, the
answers that have begun are finished, and then everything ends. The values are the fields of
`serve.arguments.Arguments`.
"""

# Ray and torch are imported once arguments and config have been read, so that what is wrong there is said at once.

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from cascade.errors import CascadeError

if TYPE_CHECKING:
    from ray.serve import Application

    from cascade.config import Config
    from serve.arguments import Arguments

_NAME = "cascade"


def command_line() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    parser.add_argument(
        "config", help="YAML file of a domain, or folder of a bundle; its base and modifiers are served"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("values", nargs="*", type=_setting, metavar="name=value", help="settings of the application")
    return parser


def _setting(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no value, as in replicas=2")
    return text


def main() -> int:
    options = command_line().parse_intermixed_args()
    from cascade.reach import check_ray_address
    from serve.arguments import checked, servable

    try:
        check_ray_address()
        values = {"config": options.config} | dict(value.split("=", 1) for value in options.values)
        arguments = checked(values)
        config = servable(arguments)
        from serve.app import application

        built = application(arguments, config)
        _serve(built, arguments, config, options.host, options.port)
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(built: Application, arguments: Arguments, config: Config, host: str, port: int) -> None:
    import ray
    from ray import serve as ray_serve

    from cascade.reach import check_storage
    from serve.proxy import install

    stop = threading.Event()
    # Ray's workers run at nice 15 by default: beside any other process, answers would wait for it.
    os.environ.setdefault("RAY_worker_niceness", "0")
    install(arguments.most_room)
    cluster = os.environ.get("RAY_ADDRESS")
    ray.init(address=cluster) if cluster else ray.init(address="local", include_dashboard=False)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
        signal.signal(number, lambda *_: stop.set())
    try:
        if cluster:
            check_storage(config.storage, ray.nodes(), shared=config.execution.shared_storage)
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(built, name=_NAME, blocking=False)
        print(f"serving {arguments.config} on http://{host}:{port}; Ctrl-C ends it", flush=True)
        stop.wait()
        ray_serve.delete(_NAME)  # waits for the answers that have begun
    finally:
        ray_serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
