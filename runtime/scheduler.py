"""Which tokens the next step computes: continuous batching under one token budget, with chunked prefill and preemption.

Planning and committing are apart, so that steps can be planned before earlier ones have been read: `plan` counts tokens, which
the host knows in advance (every sampling step adds exactly one), and `commit` learns what they were. A sequence that turns out to
have ended has its later tokens dropped. All cost is per step and per new token, never per token of context.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from fusec.runtime.blocks import BlockAllocator, block_keys
from fusec.runtime.outputs import RequestMetrics
from fusec.runtime.sampling import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One prompt and what has been generated after it.

    tokens: those known to the host.  computed: tokens whose cache rows are written once every launched step has run.  planned:
    tokens there will be once every launched step has been read.  limit: tokens at which it ends.  stops: tokens that end it, each
    with the reason to report.  decoding: only its newest token is left to compute, and the runner holds that token's id.
    row: its place in the runner's buffers, or None.
    """

    prompt: list[int]
    params: SamplingParams
    limit: int
    stops: dict[int, int | None] = field(default_factory=dict)
    seed: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.computed, self.planned = 0, len(self.tokens)
        self.decoding = False
        self.row: int | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def min_length(self) -> int:
        """The sequence does not end before it has this many tokens and one more."""
        return len(self.prompt) + self.params.min_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Work:
    """Compute `count` tokens of a sequence, from token `start` on; `samples` when a new token follows; `decode` when its id is in
    the runner's buffers."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    decode: bool


@dataclass
class Plan:
    work: list[Work]

    @property
    def decode_only(self) -> bool:
        return all(item.decode for item in self.work)


class Scheduler:
    """First come, first served. Running sequences decode; what is left of the budget prefills, oldest first; then others join.

    A sequence gets the blocks of its whole prompt when it joins, and one block at a time as it grows, always one token ahead of
    the step. When none is left the youngest sequence gives its blocks back and waits, first in line, to be computed again.
    """

    def __init__(self, allocator: BlockAllocator, *, max_num_seqs: int, max_num_batched_tokens: int, prefix_caching=False):
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError("every running sequence needs a token of the budget")
        self.allocator, self.prefix_caching = allocator, prefix_caching
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its `limit` must fit the pool: alone, every sequence can finish."""
        if self.allocator.blocks_for(sequence.limit - 1) > self.allocator.num_blocks:
            raise ValueError("the cache cannot hold this sequence")
        self.waiting.append(sequence)

    def plan(self, *, may_preempt: bool = True) -> Plan | None:
        """The next step's work, or None when there is nothing to do before a launched step is read.

        may_preempt: no launched step is unread, so that every token of every sequence is known and can be computed again.
        """
        preempted = False
        for sequence in list(self.running):
            while sequence.blocks and not self._reserve(sequence):
                if not may_preempt:
                    return None
                preempted = True
                self._preempt(self.running[-1])
        work = [self._work(sequence, 1) for sequence in self.running if sequence.decoding]
        budget = self.max_num_batched_tokens - len(work)
        for sequence in self.running:
            if not sequence.decoding:
                work.append(self._work(sequence, budget))
                budget -= work[-1].count
        while self.waiting and not preempted and budget > 0 and len(self.running) < self.max_num_seqs:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            work.append(self._work(sequence, budget))
            budget -= work[-1].count
        if not work:
            return None
        for item in work:
            self._launch(item)
        return Plan(work)

    def commit(self, plan: Plan, tokens: Iterable[int]) -> list[Sequence]:
        """Take the tokens of the plan's sampling work, in its order; returns the sequences that got one."""
        now = time.monotonic()
        grown = []
        for item, token in zip((item for item in plan.work if item.samples), tokens, strict=True):
            sequence = item.sequence
            if sequence.finished:
                continue
            sequence.tokens.append(token)
            metrics = sequence.metrics
            metrics.output_tokens += 1
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
            grown.append(sequence)
            if self.prefix_caching:
                self._publish(sequence)
            if token in sequence.stops and len(sequence.tokens) > sequence.min_length:
                self.finish(sequence, "stop", sequence.stops[token])
            elif len(sequence.tokens) >= sequence.limit:
                self.finish(sequence, "length")
        return grown

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence, wherever it is, and free its blocks. Steps still under way may write to them: whoever gets them next
        writes later on the same stream, before it reads."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _work(self, sequence, budget):
        left = sequence.planned - sequence.computed
        count = min(left, budget)
        return Work(sequence, sequence.computed, count, samples=count == left, decode=sequence.decoding)

    def _launch(self, item):
        sequence = item.sequence
        sequence.computed += item.count
        if sequence.metrics.first_scheduled_time is None:
            sequence.metrics.first_scheduled_time = time.monotonic()
        if item.samples:
            sequence.planned += 1
            sequence.decoding = True
            if sequence.planned >= sequence.limit:  # its last token is on the way
                self.running.remove(sequence)

    def _reserve(self, sequence):
        """Blocks for the token that the next step writes, and for the one after it, whose slot that step computes."""
        missing = self.allocator.blocks_for(min(sequence.planned + 1, sequence.limit - 1)) - len(sequence.blocks)
        if missing <= 0:
            return True
        blocks = self.allocator.allocate(missing)
        if blocks is None:
            return False
        sequence.blocks += blocks
        return True

    def _admit(self, sequence):
        """Give a waiting sequence the blocks of all its tokens, if that leaves a block to grow for everyone who runs."""
        size = self.allocator.block_size
        if self.prefix_caching:
            # the last token is always computed: its logits are wanted
            sequence.keys = block_keys(sequence.tokens[:-1], size)
            sequence.blocks = self.allocator.share(sequence.keys)
        missing = self.allocator.blocks_for(min(sequence.planned + 1, sequence.limit - 1)) - len(sequence.blocks)
        room = missing + len(self.running) <= self.allocator.num_free
        blocks = self.allocator.allocate(missing) if room else None
        if blocks is None:
            self._release(sequence)
            return False
        sequence.computed = len(sequence.blocks) * size
        del sequence.keys[len(sequence.blocks) :]
        sequence.blocks += blocks
        return True

    def _publish(self, sequence):
        """Let others find the blocks that are full of known, computed tokens."""
        size = self.allocator.block_size
        known = min(sequence.computed, len(sequence.tokens))
        if known // size > len(sequence.keys):
            start = len(sequence.keys)
            parent = sequence.keys[-1] if start else b""
            sequence.keys += block_keys(sequence.tokens[:known], size, start=start, parent=parent)
            for block in range(start, len(sequence.keys)):
                self.allocator.publish(sequence.blocks[block], sequence.keys[block])

    def _preempt(self, sequence):
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        sequence.metrics.preemptions += 1
        self._release(sequence)

    def _release(self, sequence):
        self.allocator.release(sequence.blocks)
        sequence.blocks, sequence.keys = [], []
        sequence.computed, sequence.decoding, sequence.row = 0, False, None
