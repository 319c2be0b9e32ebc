"""The number of threads follows what steps take."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter

import pytest

from serve.threads import Threads, give_way


class Machine:
    """A clock that moves by what a step costs with the threads that are set."""

    def __init__(self, most):
        self.now, self.threads, self.used = 0.0, 0, Counter()
        self.choice = Threads(most, self._set, lambda: self.now)

    def _set(self, threads):
        self.threads = threads

    def compute(self, steps, cost, kind="step", tokens=1):
        """Compute so many steps, each for `cost(threads)` seconds; returns how often each number was used."""
        used = Counter()
        for _ in range(steps):
            with self.choice.computing(kind, tokens):
                used[self.threads] += 1
                self.now += cost(self.threads)
        return used


@pytest.mark.parametrize("best", [1, 2, 4, 6])
def test_the_fastest_number_is_used_and_the_others_seldom_tried(best):
    machine = Machine(6)
    used = machine.compute(1000, lambda threads: 0.01 if threads == best else 0.1)
    assert set(used) == {1, 2, 4, 6}
    assert used[best] > 960


def test_it_follows_a_machine_that_others_begin_to_use_and_leave_again():
    machine = Machine(2)
    free, contended = {1: 0.02, 2: 0.015}.get, {1: 0.021, 2: 0.3}.get
    assert machine.compute(300, free)[2] > 270
    assert machine.compute(300, contended)[1] > 280
    assert machine.compute(3000, free)[2] > 2000


def test_kinds_and_sizes_of_work_are_known_apart():
    machine = Machine(2)
    for _ in range(100):
        machine.compute(1, {1: 0.02, 2: 0.1}.get)
        machine.compute(1, {1: 2.0, 2: 1.0}.get, kind="prompt", tokens=400)
        machine.compute(1, {1: 0.9, 2: 0.5}.get, tokens=32)
    assert machine.compute(10, {1: 0.02, 2: 0.1}.get)[1] >= 9
    assert machine.compute(10, {1: 2.0, 2: 1.0}.get, kind="prompt", tokens=300)[2] >= 9
    assert machine.compute(10, {1: 0.9, 2: 0.5}.get, tokens=40)[2] >= 9


def test_what_fails_is_not_taken_for_fast():
    machine = Machine(2)
    machine.compute(50, {1: 0.1, 2: 0.01}.get)
    for _ in range(30):
        with pytest.raises(ValueError, match="out of memory"), machine.choice.computing("step", 1):
            raise ValueError("out of memory")
    assert machine.compute(30, {1: 0.1, 2: 0.01}.get)[2] > 25


def test_a_single_core_sets_nothing():
    machine = Machine(1)
    assert machine.compute(5, lambda threads: 1.0) == {0: 5}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities are a process's")
def test_who_computes_gives_way_and_nobody_else():
    found = []

    def compute():
        give_way()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        later = threading.Thread(target=lambda: found.append(os.getpriority(os.PRIO_PROCESS, 0)))
        later.start()
        later.join()

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert found == [min(before + 5, 19)] * 2
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
