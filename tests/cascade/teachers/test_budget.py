from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import BudgetExceeded
from cascade.teachers.budget import BudgetState, LocalBudget, price_usd

_step = st.tuples(st.sampled_from([1, 2, 3]), st.floats(0, 1), st.floats(0, 1), st.booleans())


@given(st.floats(0, 5), st.floats(0, 2), st.lists(_step, max_size=60))
def test_no_limit_is_ever_passed(domain: float, tier: float, steps: list) -> None:
    state = BudgetState("code", domain, {2: tier})
    open_leases: list[tuple[str, float]] = []
    for number, (which, worst, share, settle) in enumerate(steps):
        try:
            if state.reserve(str(number), which, worst):
                open_leases.append((str(number), worst * share))
        except BudgetExceeded:
            pass
        if settle and open_leases:
            state.settle(*open_leases.pop(0))
    for lease in open_leases:
        state.settle(*lease)
    assert state.total_spent() <= domain + 1e-6
    assert state.total_spent(2) <= tier + 1e-6


def test_it_waits_for_requests_in_flight_and_refuses_what_can_never_fit() -> None:
    state = BudgetState("code", 10, {1: 3}, spent={1: 1.0})
    assert state.reserve("a", 1, 1.5)
    assert not state.reserve("b", 1, 1.5)
    state.settle("a", 0.5)
    assert state.reserve("b", 1, 1.5)
    with pytest.raises(BudgetExceeded, match=r"tier 1 of domain code.*\$1\.50.*raise tiers\.0\.budget_usd"):
        state.reserve("c", 1, 1.6)
    with pytest.raises(BudgetExceeded, match="raise budget_usd"):
        state.reserve("c", 2, 9)


def test_what_a_dead_holder_set_aside_counts_as_spent() -> None:
    state = BudgetState("code", 1)
    assert state.reserve("a", 1, 0.8, holder="one")
    assert state.reserve("b", 1, 0.1, holder="two")
    assert not state.reserve("c", 1, 0.8)
    state.write_off("one")
    with pytest.raises(BudgetExceeded):
        state.reserve("c", 1, 0.8)
    assert state.total_spent() == pytest.approx(0.8)
    assert state.total_reserved() == pytest.approx(0.1)
    state.settle("a", 0.1)
    assert state.total_spent() == pytest.approx(0.1)
    assert state.reserve("c", 1, 0.8)


async def test_a_batch_reserves_for_as_many_as_fit() -> None:
    budget = LocalBudget(BudgetState("code", 1.0))
    first = await budget.reserve_some(1, [0.3, 0.3, 0.3, 0.3])
    assert len(first) == 3
    waiting = asyncio.ensure_future(budget.reserve_some(1, [0.3, 0.9]))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await budget.settle(first[0], 0.1)
    assert len(await waiting) == 1
    for lease in first[1:]:
        await budget.settle(lease, 0.3)
    with pytest.raises(BudgetExceeded):
        await budget.reserve_some(1, [0.5, 0.1])


async def test_coroutines_wait_for_their_turn() -> None:
    budget = LocalBudget(BudgetState("code", 1.0))

    async def one() -> bool:
        try:
            lease = await budget.reserve(1, 0.3)
        except BudgetExceeded:
            return False
        await asyncio.sleep(0.001)
        await budget.settle(lease, 0.1)
        return True

    done = await asyncio.wait_for(asyncio.gather(*(one() for _ in range(30))), 5)
    assert sum(done) == 8
    assert budget.state.total_spent() == pytest.approx(0.8)


def test_cached_tokens_have_their_own_price(make_teacher) -> None:
    teacher = make_teacher("http://x/v1", cached_input_usd_per_million=1.0)
    assert price_usd(teacher, 1000, 100, cached_tokens=400) == pytest.approx((600 * 10 + 400 * 1 + 100 * 100) / 1e6)
    assert price_usd(make_teacher("http://x/v1"), 1000, 0, 400) == pytest.approx(0.01)
    assert price_usd(make_teacher("http://x/v1", mode="batch", batch_price_share=0.4), 1000, 0) == pytest.approx(0.004)
