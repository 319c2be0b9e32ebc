"""Hashed n-grams: fixed for all time, blind to numbers, bounded."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time

import numpy as np

from cascade.routing.features import MAX_BYTES, featurize


def test_vectors_are_the_same_in_every_process_and_version() -> None:
    text = "Wie viele Äpfel sind 12 + 30?"
    program = (
        "import hashlib; from cascade.routing.features import featurize;"
        f"print(hashlib.sha256((featurize([{text!r}], 512) > 0).tobytes()).hexdigest())"
    )
    env = {"PYTHONHASHSEED": "123"}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    mine = hashlib.sha256((featurize([text], 512) > 0).tobytes()).hexdigest()
    assert mine == other.stdout.strip()
    assert mine.startswith("45d8be1f2704bb93")


def test_rows_have_length_one_and_empty_text_is_zero() -> None:
    rows = featurize(["", "   ", "a", "What is this?"], 256)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), [0, 0, 1, 1])


def test_numbers_case_and_space_do_not_count_but_words_do() -> None:
    a, b, c = featurize(["What is 12 plus 34?", "what  is 98 plus\n76?", "Write a poem about 12 cats"], 4096)
    assert np.array_equal(a, b)
    assert a @ c < 0.3 < 0.6 < a @ featurize(["What is 12 plus 345?"], 4096)[0]


def test_long_text_costs_bounded_time() -> None:
    text = "all work and no play makes jack a dull boy. " * 20_000
    start = time.process_time()
    row = featurize([text], 4096)[0]
    assert time.process_time() - start < 0.5
    assert np.isfinite(row).all()
    assert len(text) > 100 * MAX_BYTES / 2
