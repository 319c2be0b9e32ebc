"""Grammars that answers keep to: checked in a process that can be ended, compiled, and kept for the next request."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import llguidance
import llguidance.hf
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cascade.errors import DataError
from serve import compiles
from serve.events import Grammar

_T = TypeVar("_T")
_SECONDS, _BYTES = 2, 1 << 30
"""Processor time and address space that compiling a grammar may take."""
_PATIENCE_S = 15.0
"""The most that a check waits for, on a machine that has no processor time to give."""
_KEPT, _KEPT_REFUSED = 16, 256
_LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000)
"""A fifth of the library's: 20 MB, not 100, for a pattern that makes a state of every letter."""


class Grammars:
    """Makes matchers of grammars for one tokenizer (llguidance). Safe for threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Iterable[int]) -> None:
        """
        Args:
            vocabulary: width of the model's logits.
            ends: token ids that end an answer.
        """
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._made: llguidance.LLTokenizer | None = None  # takes a second, and most requests need none
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._refused: OrderedDict[Grammar, str] = OrderedDict()
        self._pool = ThreadPoolExecutor(2, "grammar")

    def pool_for(self, grammar: Grammar | None) -> ThreadPoolExecutor | None:
        """Threads to call `matcher` in: few, so that grammars which are slow to compile hold up only each other.

        None, for any thread, where there is nothing to compile.
        """
        with self._lock:
            return None if grammar is None or grammar in self._kept or grammar in self._refused else self._pool

    def matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """A matcher at its start.

        Raises:
            DataError: the grammar is none, uses what is not supported, or exceeds the limits.
        """
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar].deep_copy()
            wrong = self._refused.get(grammar)
        if wrong is None:
            wrong = _what_is_wrong(grammar)
        if not wrong:
            made = llguidance.LLMatcher(
                self._tokens(), compiles.compiled(grammar.kind, grammar.text), log_level=0, limits=_LIMITS
            )
            wrong = made.get_error()
        with self._lock:
            if not wrong:
                _keep(self._kept, grammar, made, _KEPT)
                return made.deep_copy()
            _keep(self._refused, grammar, wrong, _KEPT_REFUSED)
        kind = "JSON schema" if grammar.kind == "json_schema" else "grammar of the calls"
        raise DataError(f"the {kind} cannot be used: {wrong[:500]}")

    def close(self) -> None:
        """Take no more grammars."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _tokens(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._made is None:
                if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                    raise DataError("the base's tokenizer is of a kind that no grammar can be kept to with")
                self._made = llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary, self._ends)
            return self._made


def _what_is_wrong(grammar: Grammar) -> str:
    """What compiling it in a process of its own says; "" if all is well."""
    command = [sys.executable, "-I", compiles.__file__, str(_SECONDS), str(_BYTES)]
    asked = json.dumps({"kind": grammar.kind, "text": grammar.text})
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile; make it simpler"
    if done.returncode:
        return "it takes too much time or memory to compile; make it simpler (fewer patterns that must all match)"
    return done.stdout.strip()


def _keep(kept: OrderedDict[Grammar, _T], grammar: Grammar, value: _T, most: int) -> None:
    kept[grammar] = value
    while len(kept) > most:
        kept.popitem(last=False)
