"""The scheduler alone, with a device that answers at once or late, and random loads."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusec.runtime.blocks import BlockAllocator
from fusec.runtime.sampling import SamplingParams
from fusec.runtime.scheduler import Scheduler, Sequence


def sequence(prompt, max_tokens, stops=(), **params):
    return Sequence(list(prompt), SamplingParams(max_tokens=max_tokens, **params), limit=len(prompt) + max_tokens,
                    stops={token: None for token in stops})


def scheduler(num_blocks=100, block_size=4, max_num_seqs=8, budget=16, **options):
    return Scheduler(BlockAllocator(num_blocks, block_size), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **options)


def shape(plan):
    return [(item.start, item.count, item.samples, item.decode) for item in plan.work]


def token_after(tokens):
    """What the device would sample: any function of the tokens before."""
    return hash(tuple(tokens)) % 10


def answer(plan):
    return [token_after(item.sequence.tokens) for item in plan.work if item.samples]


def test_long_prompt_is_chunked_beside_decoding():
    plans = scheduler(budget=8)
    first, second = sequence(range(3), 8), sequence(range(14), 2)
    plans.add(first)
    plans.add(second)
    steps = []
    for _ in range(4):
        plan = plans.plan()
        steps.append(shape(plan))
        plans.commit(plan, answer(plan))
    assert steps == [
        [(0, 3, True, False), (0, 5, False, False)],
        [(3, 1, True, True), (5, 7, False, False)],
        [(4, 1, True, True), (12, 2, True, False)],
        [(5, 1, True, True), (14, 1, True, True)],
    ]
    assert second.finish_reason == "length" and plans.running == [first]


def test_steps_are_planned_before_earlier_ones_are_read():
    plans = scheduler()
    one = sequence(range(4), 3)
    plans.add(one)
    ahead = [plans.plan(may_preempt=False) for _ in range(3)]
    assert [shape(plan) for plan in ahead] == [[(0, 4, True, False)], [(4, 1, True, True)], [(5, 1, True, True)]]
    assert plans.plan(may_preempt=False) is None  # its last token is on the way
    for plan in ahead:
        plans.commit(plan, [7])
    assert one.tokens == [0, 1, 2, 3, 7, 7, 7] and one.finished and plans.allocator.num_used == 0


def test_tokens_after_the_end_are_dropped():
    plans = scheduler()
    one = sequence(range(4), 9, stops=[5])
    plans.add(one)
    first, second = plans.plan(), plans.plan(may_preempt=False)
    plans.commit(first, [5])
    assert plans.commit(second, [6]) == []
    assert one.tokens[4:] == [5] and one.finish_reason == "stop"


def test_min_tokens_delays_stops():
    plans = scheduler()
    one = sequence(range(2), 9, stops=[5], min_tokens=2)
    plans.add(one)
    while not one.finished:
        plans.commit(plans.plan(), [5])
    assert one.tokens[2:] == [5, 5, 5]


def test_the_youngest_gives_way_and_returns_first():
    plans = scheduler(num_blocks=5, block_size=2, budget=8)
    old, young, later = sequence(range(2), 7), sequence(range(2), 7), sequence(range(2), 1)
    for one in (old, young, later):
        plans.add(one)
    order = []
    while plans.waiting or plans.running:
        plan = plans.plan()
        order += [one for one in (old, young, later) if one.finished and one not in order]
        plans.commit(plan, answer(plan))
    assert young.metrics.preemptions == 1 and old.metrics.preemptions == 0
    assert order[0] is old
    for one in (old, young):
        assert len(one.tokens) == 9
        assert all(one.tokens[n] == token_after(one.tokens[:n]) for n in range(2, 9))
    assert plans.allocator.num_used == 0


def test_prefix_is_computed_once():
    plans = scheduler(prefix_caching=True)
    one, two = sequence(range(10), 2), sequence([*range(8), 99, 100], 2)
    plans.add(one)
    plans.commit(plans.plan(), [1])
    plans.add(two)
    plan = plans.plan()
    assert shape(plan) == [(10, 1, True, True), (8, 2, True, False)]
    assert two.blocks[:2] == one.blocks[:2]


def test_a_sequence_that_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        scheduler(num_blocks=2).add(sequence(range(8), 8))


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(8, 20), st.integers(0, 2), st.booleans(), st.integers(0, 2**32))
def test_every_request_ends_and_no_block_leaks(sizes, num_blocks, run_ahead, caching, seed):
    """Random prompts, stops and aborts, on a pool so small that sequences push each other out."""
    dice = random.Random(seed)
    plans = scheduler(num_blocks=num_blocks, block_size=4, max_num_seqs=4, budget=8, prefix_caching=caching)
    todo = [sequence([dice.randrange(2) for _ in range(prompt)], new, stops=[9]) for prompt, new in sizes]
    everyone, under_way = list(todo), deque()
    for _ in range(5000):
        if todo and dice.random() < 0.5:
            plans.add(todo.pop(0))
        if plans.running and dice.random() < 0.02:
            plans.finish(dice.choice(plans.running), "abort")
        plan = plans.plan(may_preempt=not under_way)
        if plan is not None:
            work = plan.work
            assert sum(item.count for item in work) <= 8 and len(work) <= 4 and all(item.count > 0 for item in work)
            assert all(len(item.sequence.blocks) * 4 >= item.start + item.count for item in work)
            assert [item.decode for item in work] == sorted((item.decode for item in work), reverse=True)
            owners = [block for one in {item.sequence for item in work} for block in one.blocks]
            assert caching or len(owners) == len(set(owners))
            under_way.append(plan)
        if under_way and (plan is None or len(under_way) > run_ahead):
            plan = under_way.popleft()
            plans.commit(plan, answer(plan))
        if not (todo or plans.waiting or plans.running or under_way):
            break
    assert all(one.finished for one in everyone)
    assert plans.allocator.num_used == 0
    for one in everyone:
        assert all(one.tokens[n] == token_after(one.tokens[:n]) for n in range(len(one.prompt), len(one.tokens)))
        assert one.finish_reason == "abort" or one.tokens[-1] == 9 or len(one.tokens) == one.limit
