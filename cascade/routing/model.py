"""The router as it is served: a query in, a `Route` out; stored as safetensors and JSON.

Rule: the router first asks whether it knows queries of this kind. If its confidence in that is below the threshold,
the request goes to the base ("low-confidence"). Otherwise the candidate with the highest calibrated probability of a
right answer gets it; the base wins ties. The confidence of a route is P(known kind) x P(right | known kind): what the
measurements vouch for, hence low for anything unlike them.

In a conversation the last user message decides, unless it is a follow-up ("Why?", "Shorter, please."), which says
nothing of what it is about: then the message before it does, and the confidence has P(follow-up) as a further factor.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cascade.benchmarks.offered_functions import describes_functions
from cascade.errors import DataError, FormatError
from cascade.fingerprints import sha256_of_file
from cascade.routing.calibration import Calibrator
from cascade.routing.features import featurize
from cascade.routing.network import RouterNetwork
from cascade.routing.offers import fit, functions_of
from cascade.store import Store
from cascade.tasks import Message, Route, Task

BASE = "base"
KNOWN = "known"
"""Name of the output that says whether a query is of a measured kind."""
FOLLOW_UP = "follow-up"
"""Name of the output that says whether a message means nothing without those before it."""
RESERVED = (KNOWN, FOLLOW_UP)
"""The outputs that are no candidates, in their order behind these."""

FORMAT_VERSION = 3
_MOST_TURNS = 8
"""A conversation is read back so many user messages at most."""
_WEIGHTS, _MANIFEST = "router.safetensors", "manifest.json"


Mode = Literal["default", "turbo", "max-quality"]


@dataclass(frozen=True)
class Lean:
    """How a mode departs from the plain rule.

    Attributes:
        least, most: bounds of the threshold, however the router's own is set.
        handicap: see `RouterModel.decide`.
    """

    least: float
    most: float
    handicap: float


MODES: dict[Mode, Lean] = {
    "default": Lean(0.0, 1.0, 0.0),
    "turbo": Lean(0.95, 1.0, 0.15),
    "max-quality": Lean(0.0, 0.5, -0.15),
}
"""Turbo asks a modifier only where it is surely better, so that swaps are few; max-quality wherever it may be."""


@dataclass(frozen=True)
class RouterModel:
    """A trained router.

    Attributes:
        candidates: "base" first, then the modifiers' domains.
        features: length of a query's vector.
        hidden: width of the network.
        threshold: used where a request does not bring its own.
        calibrators: per candidate and for each of `RESERVED`.
    """

    network: RouterNetwork
    candidates: tuple[str, ...]
    features: int
    hidden: int
    threshold: float
    calibrators: dict[str, Calibrator] = field(default_factory=dict)

    def route(self, query: str | Sequence[Message], threshold: float | None = None, mode: Mode = "default") -> Route:
        """Decide who answers.

        Args:
            query: a question, or a conversation.
            threshold: confidence that the kind of query is known, below which the base answers; None: the router's own,
                as the mode bounds it.
            mode: see `MODES`.
        """
        lean = MODES[mode]
        if threshold is None:
            threshold = min(max(self.threshold, lean.least), lean.most)
        texts = [query] if isinstance(query, str) else queries_of(query)
        vouched = 1.0
        for place, text in enumerate(texts):
            known, right, follow_up = (column[0] for column in self.probabilities([text]))
            if follow_up < 0.5:
                break
            if place == len(texts) - 1:  # to a question that is not there
                known = 0.0
                break
            vouched *= float(follow_up)
        route = self.decide(float(known), right, threshold, lean.handicap)
        if place == 0:
            return route
        reason = "follow-up" if route.reason == "router" else route.reason
        scaled = {name: vouched * p for name, p in route.probabilities.items()}
        return Route(route.choice, scaled[route.choice], reason, scaled)

    def decide(self, known: float, right: NDArray[np.float64], threshold: float, handicap: float = 0.0) -> Route:
        """The rule, given the probabilities.

        Args:
            known: probability that the query is of a measured kind.
            right: probability of a right answer per candidate, if it is.
            handicap: how much likelier to be right than the base a modifier must be; negative favours modifiers.
        """
        vouched = {name: float(known * p) for name, p in zip(self.candidates, right, strict=True)}
        if known < threshold:
            return Route(BASE, vouched[BASE], "low-confidence", vouched)
        # The base is first and wins ties; where modifiers are favoured, the best of them is chosen by itself.
        leaning = right - np.where(np.arange(len(right)) == 0, 0.0, handicap)
        choice = self.candidates[int(leaning.argmax())]
        return Route(choice, vouched[choice], "router", vouched)

    def probabilities(
        self, queries: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Calibrated probabilities.

        Returns:
            Shape (queries,): that the query is of a measured kind; shape (queries, candidates): that the candidate
            answers it rightly, if so; shape (queries,): that it is a follow-up.
        """
        logits = self.network.logits(featurize(queries, self.features))
        names = (*self.candidates, *RESERVED)
        columns = [self.calibrators.get(n, Calibrator())(logits[:, i]) for i, n in enumerate(names)]
        return columns[-2], np.stack(columns[:-2], axis=1), columns[-1]

    def save(self, folder: str | os.PathLike[str], report: dict[str, Any] | None = None) -> None:
        """Write weights and manifest (with the report of the training, if given) to a folder."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), target / _WEIGHTS)
        manifest = {
            "format_version": FORMAT_VERSION,
            "sha256": sha256_of_file(target / _WEIGHTS),
            "candidates": list(self.candidates),
            "features": self.features,
            "hidden": self.hidden,
            "threshold": self.threshold,
            "calibrators": {n: {"method": c.method, "parameters": c.parameters} for n, c in self.calibrators.items()},
            "report": report or {},
        }
        (target / _MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RouterModel:
        """Read a router back.

        Raises:
            FormatError: files are missing, damaged, or of a newer version.
        """
        source = Path(folder)
        try:
            manifest = json.loads((source / _MANIFEST).read_text(encoding="utf-8"))
            if manifest["format_version"] != FORMAT_VERSION:
                raise FormatError(
                    f"the router in {source} has format {manifest['format_version']}, this version reads "
                    f"{FORMAT_VERSION}: train it again with `cascade train-router`"
                )
            if sha256_of_file(source / _WEIGHTS) != manifest["sha256"]:
                raise FormatError(f"{source / _WEIGHTS} is damaged (its SHA-256 is not the manifest's)")
            network = RouterNetwork(
                manifest["features"], manifest["hidden"], len(manifest["candidates"]) + len(RESERVED)
            )
            network.load_state_dict(load_file(source / _WEIGHTS))
            calibrators = {
                n: Calibrator(c["method"], tuple(c["parameters"])) for n, c in manifest["calibrators"].items()
            }
            names = tuple(manifest["candidates"])
            threshold = float(manifest["threshold"])
            model = cls(network.eval(), names, manifest["features"], manifest["hidden"], threshold, calibrators)
            model._check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise FormatError(f"the router in {source} cannot be read: {type(error).__name__}: {error}") from error
        return model

    def _check(self) -> None:
        """
        Raises:
            ValueError: it is none by which requests could be routed.
        """
        names = self.candidates
        if names[:1] != (BASE,) or len(set(names)) < len(names) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"the candidates are {BASE!r} and then the modifiers, each once; not {names}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"a threshold lies between 0 and 1, not at {self.threshold}")
        if not all(np.isfinite(probability).all() for probability in self.probabilities(["What?"])):
            raise ValueError("its probabilities are none")


TOOLS_OFFERED = "Functions to call are offered."
"""Stands in a query's text for the functions that its system message describes."""


def queries_of(messages: Sequence[Message]) -> list[str]:
    """What the router reads of a conversation: its user messages, the last one first, "" if there is none.

    What tools answered (role "tool") is none of them: it says nothing of what is wanted. Each says whether functions to
    call are offered and how well they fit it: whether "What is the weather in Oslo?" is small talk or a call to make is
    not in the question.
    """
    questions = [m.content for m in reversed(messages) if m.role == "user"][:_MOST_TURNS] or [""]
    offer = next((m.content for m in messages if describes_functions(m)), None)
    if offer is None:
        return questions
    functions = functions_of(offer)
    return [f"{question}\n{TOOLS_OFFERED} {fit(question, functions)}".rstrip() for question in questions]


def query_of(task: Task) -> str:
    """What the router reads of a task: the text of its last question."""
    return queries_of(task.messages)[0]


# ------------------------------------------------------------------------------------------------ registry

_FOLDER = "router"
_VERSION = re.compile(r"[0-9a-f]{12}")


def publish(store: Store, model: RouterModel, report: dict[str, Any] | None = None) -> str:
    """Put a router into the store and make it the current one.

    Returns:
        Its version: the first twelve hex digits of the SHA-256 over the manifest, which holds that of the weights.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch, report)
        version = sha256_of_file(Path(scratch) / _MANIFEST)[:12]
        for name in (_WEIGHTS, _MANIFEST):
            store.write_bytes(f"{_FOLDER}/{version}/{name}", (Path(scratch) / name).read_bytes())
    store.write_bytes(f"{_FOLDER}/CURRENT", f"{version}\n".encode())
    return version


def current_version(store: Store) -> str | None:
    """Version of the current router, None if none was trained.

    Raises:
        FormatError: CURRENT is damaged.
    """
    if not store.exists(f"{_FOLDER}/CURRENT"):
        return None
    version = store.read_bytes(f"{_FOLDER}/CURRENT").decode("utf-8", "replace").strip()
    if not _VERSION.fullmatch(version):
        raise FormatError(f"{_FOLDER}/CURRENT holds no version's name")
    return version


def set_threshold(store: Store, cache: str | os.PathLike[str], threshold: float) -> str:
    """Give the current router another threshold, as a new version.

    Returns:
        Its version.

    Raises:
        DataError: there is no router, or the threshold is not between 0 and 1.
        FormatError: see `RouterModel.load`.
    """
    found = load_current(store, cache)
    if found is None or not 0 <= threshold <= 1:
        raise DataError("train a router first, with `cascade train-router`; a threshold lies between 0 and 1")
    return publish(store, replace(found[1], threshold=threshold), current_report(store))


def current_report(store: Store) -> dict[str, Any]:
    """The report of the current router's training; empty if there is no router."""
    version = current_version(store)
    return store.read_json(f"{_FOLDER}/{version}/{_MANIFEST}")["report"] if version else {}


def load_current(store: Store, cache: str | os.PathLike[str]) -> tuple[str, RouterModel] | None:
    """The current router with its version, None if none was trained.

    Args:
        cache: local folder for copies of files from an object store.

    Raises:
        FormatError: see `RouterModel.load`.
    """
    version = current_version(store)
    if version is None:
        return None
    return version, RouterModel.load(local_folder(store, version, cache))


def local_folder(store: Store, version: str, cache: str | os.PathLike[str]) -> Path:
    """A local folder with the files of a router; see `load_current`."""
    return store.local_copy(f"{_FOLDER}/{version}", cache)
