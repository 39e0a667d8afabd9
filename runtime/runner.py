"""Runs the scheduler's plans on the program: builds batches, replays decode steps as CUDA graphs, samples, hands tokens back.

A decode step is forward, sample, advance, on buffers that stay on the device; steps of the same sequences need nothing from the
host. What the host wants of a step, its tokens, it reads while the next one runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fusec.runtime.batch import Batch
from fusec.runtime.drawing import Drawing
from fusec.runtime.sampling import SampleResult, Variant, sample
from fusec.runtime.sampling_state import SamplingState
from fusec.runtime.scheduler import Plan, Sequence
from fusec.runtime.step_buffers import RING, StepBuffers


class Runner:
    """Owns the device side of the engine: one row of buffers per running sequence, and the captured graphs.

    program: see Program.  max_num_seqs: rows.  enforce_eager: no CUDA graphs.
    """

    def __init__(self, program, *, max_num_seqs: int, max_model_len: int, block_size: int, enforce_eager: bool = False):
        self.program, self.device = program, program.device
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.cuda = self.device.type == "cuda"
        self.buffers = StepBuffers(max_num_seqs, -(-max_model_len // block_size), block_size, self.device)
        self.sampling = SamplingState(max_num_seqs, program.vocab_size, self.device)
        self.seated: list[Sequence] = []
        self.variant = Variant()
        self.tabled = [0] * max_num_seqs  # entries of each row's block table that are on the device
        self.steps = 0  # decode steps launched
        self.graphs: dict[tuple, DecodeGraph] | None = {} if self.cuda and program.supports_graphs and not enforce_eager else None
        self.pool = None
        self.copies = torch.cuda.Stream(self.device) if self.cuda else None

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step. It runs after all steps launched before; `Launched.read` waits for it."""
        self._seat(plan)
        self._extend_tables()
        return self._decode(plan) if plan.decode_only else self._mixed(plan)

    @torch.inference_mode()
    def logits(self, tokens: list[int], blocks: list[int], *, chunk: int = 512) -> torch.Tensor:
        """Teacher-forced logits of every token, float32 [T, V] on the CPU, computed `chunk` tokens at a time into `blocks`."""
        table = self._upload(np.array([blocks], np.int32))
        size, parts = self.buffers.block_size, []
        for start in range(0, len(tokens), chunk):
            end = min(start + chunk, len(tokens))
            positions = np.arange(start, end)
            slots = np.array(blocks, np.int64)[positions // size] * size + positions % size
            batch = Batch(
                ids=self._upload(np.array(tokens[start:end], np.int32)), positions=self._upload(positions.astype(np.int32)),
                slots=self._upload(slots), query_starts=self._upload(np.array([0, end - start], np.int32)),
                context_lens=self._upload(np.array([end], np.int32)), block_tables=table,
                rows=self._upload(np.arange(end - start, dtype=np.int32)), max_query=end - start,
                max_context=self._context_bucket(end),
            )
            parts.append(self.program.forward(batch).float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def reset(self) -> None:
        """Free every row, whatever state the last launch left them in."""
        self.seated.clear()
        self.buffers.restart()
        self.sampling.clear(slice(None))
        if self.cuda:
            torch.cuda.synchronize(self.device)
        self.steps = int(self.buffers.cursor)

    # Rows

    def _seat(self, plan):
        """Give every sequence of the plan a row; close the gaps that others left."""
        planned = [item.sequence for item in plan.work]
        if len(planned) == len(self.seated) and all(sequence.row is not None for sequence in planned):
            return
        self._close_gaps(set(map(id, planned)))
        first, new = len(self.seated), [sequence for sequence in planned if sequence.row is None]
        for row, sequence in enumerate(new, first):
            sequence.row, self.tabled[row] = row, 0
        self.seated += new
        if new:
            self.sampling.seat(range(first, len(self.seated)), new, self._upload)
        self.variant = Variant.covering(sequence.params.variant for sequence in self.seated)

    def _close_gaps(self, stay):
        """Free the rows of all but the sequences whose ids are in `stay`; the last rows take their places, all in one move."""
        kept, before = [], len(self.seated)
        for row, sequence in enumerate(self.seated):
            if sequence.row == row and id(sequence) in stay:
                kept.append(row)
            elif sequence.row == row:
                sequence.row = None
        count = len(kept)
        if count == before:
            return
        moved = [row for row in kept if row >= count]
        gaps = sorted(set(range(count)).difference(kept))
        for source, target in zip(moved, gaps, strict=True):
            self.seated[target], self.tabled[target] = self.seated[source], self.tabled[source]
            self.seated[target].row = target
        del self.seated[count:]
        if moved:
            sources, targets = self._upload(np.array([moved, gaps], np.int64))
            self.buffers.move(sources, targets)
            self.sampling.move(sources, targets)
        self.buffers.clear(slice(count, before))
        self.sampling.clear(slice(count, before))

    def _extend_tables(self):
        """Send the blocks that sequences got since the last step."""
        news = [(row, column, sequence.blocks[column]) for row, sequence in enumerate(self.seated)
                if len(sequence.blocks) > self.tabled[row] for column in range(self.tabled[row], len(sequence.blocks))]
        if news:
            rows, columns, blocks = self._upload(np.array(news, np.int32).T.copy())
            self.buffers.tables[rows.long(), columns.long()] = blocks
            for row, column, _ in news:
                self.tabled[row] = column + 1

    # Steps

    def _decode(self, plan):
        """Every seated sequence decodes one token."""
        count, slot = len(self.seated), self.steps % RING
        rows = [item.sequence.row for item in plan.work]
        key = (_bucket(count, self.max_num_seqs) if self.cuda else count, self.variant,
               self._context_bucket(max(item.start + 1 for item in plan.work)))  # fmt: skip
        if self.graphs is None:
            result = self._decode_step(*key)
        else:
            if key not in self.graphs:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.graphs[key] = DecodeGraph(self, key)
            result = self.graphs[key].replay()
        self.steps += 1
        return Launched(plan, rows, self._send_back(self.buffers.ring[slot, :count], result))

    def _decode_step(self, count, variant, max_context) -> SampleResult:
        """Forward, sample, advance, of the first `count` rows. A CUDA graph holds all of it: nothing here may wait."""
        buffers = self.buffers
        batch = buffers.batch(count, max_context)
        params = self.sampling.select(slice(count), variant.adjusted)
        if self.program.draws and variant.plain:
            from fusec.runtime.draw import settle

            logits = self.program.forward(batch, Drawing.of(params, batch.context_lens, buffers.best, noise=variant.mode > 0))
            if logits is None:
                return SampleResult(settle(buffers.best, count, buffers))
        else:
            logits = self.program.forward(batch)
        result = sample(logits, params, batch.context_lens, variant, buffers)
        if variant.adjusted:  # moving on has left it as it was whether a row is anybody's
            self.sampling.count(buffers.rows[:count].long(), result.tokens, batch.context_lens > 0)
        return result

    def _mixed(self, plan):
        """Prefill chunks, together with sequences that decode."""
        work, buffers = plan.work, self.buffers
        starts, counts, seats = np.array([(item.start, item.count, item.sequence.row) for item in work], np.int32).T
        samples = np.array([item.samples for item in work])
        ends, contexts = np.cumsum(counts), starts + counts
        decoding = sum(item.decode for item in work)  # they come first, one token each; their ids are on the device
        known = [item.sequence.tokens[item.start : item.start + item.count] for item in work[decoding:]]
        wanted = ends[samples] - 1 if samples.any() else ends[-1:] - 1  # a program computes one row of logits at least
        ids, positions, owners, query_starts, context_lens, tables, wanted, rows, lengths = self._upload_all(
            np.concatenate([np.zeros(decoding), *known]), np.arange(ends[-1]) + np.repeat(contexts - ends, counts),
            np.repeat(seats, counts), np.append(0, ends), contexts, seats, wanted, seats[samples], contexts[samples],
        )  # fmt: skip
        ids[:decoding] = buffers.ids[tables[:decoding]]
        logits = self.program.forward(Batch(
            ids=ids, positions=positions, slots=buffers.slots_of(owners, positions), query_starts=query_starts,
            context_lens=context_lens, block_tables=buffers.tables[tables], rows=wanted, max_query=int(counts.max()),
            max_context=self._context_bucket(int(contexts.max())),
        ))  # fmt: skip
        if not samples.any():
            return Launched(plan, [], None)
        variant = Variant.covering(item.sequence.params.variant for item in work if item.samples)
        result = sample(logits, self.sampling.select(rows, variant.adjusted), lengths, variant)
        if variant.adjusted:
            self.sampling.count(rows.long(), result.tokens, lengths > 0)
        buffers.begin(rows, result.tokens, lengths)
        return Launched(plan, list(range(len(rows))), self._send_back(result.tokens, result))

    def _context_bucket(self, length):
        """What `max_context` says for contexts up to `length`: few values, so that there are few graphs, and the same with graphs
        as without."""
        bucket = 1024
        while bucket < length:
            bucket *= 4
        return min(bucket, self.max_model_len)

    # Between host and device

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor

    def _upload_all(self, *parts: np.ndarray) -> list[torch.Tensor]:
        """Several arrays as int32 in one copy, each aligned to 128 bytes."""
        offsets = np.cumsum([0, *(-(-len(part) // 32) * 32 for part in parts)])
        packed = np.zeros(offsets[-1], np.int32)
        for part, offset in zip(parts, offsets, strict=False):
            packed[offset : offset + len(part)] = part
        packed = self._upload(packed)
        return [packed[offset : offset + len(part)] for part, offset in zip(parts, offsets, strict=False)]

    def _send_back(self, tokens, result) -> SentBack:
        """Start copying a step's tokens to the host, beside the next step; what is rarely asked for is copied in between."""
        extras = [tensor for tensor in result[1:] if tensor is not None]
        if not self.cuda:
            return SentBack(tokens.clone(), extras)
        extras = [_pinned(tensor) for tensor in extras]
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            host, done = _pinned(tokens), torch.cuda.Event()
            done.record()
        return SentBack(host, extras, done, source=tokens)


def _pinned(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _bucket(count: int, most: int) -> int:
    """The number of rows a decode step of `count` sequences runs with: 1, 2, 4, then multiples of 8."""
    return min(most, next((size for size in (1, 2, 4) if count <= size), -(-count // 8) * 8))


class DecodeGraph:
    """One captured decode step, for a number of rows, a variant of the sampler and a bound on the context."""

    def __init__(self, runner: Runner, key: tuple):
        buffers = runner.buffers
        # Nothing is captured or warmed up on live rows: as padding they write no cache and do not move on.
        saved = [(tensor, tensor.clone()) for tensor in (buffers.context_lens, buffers.slots, buffers.cursor)]
        buffers.context_lens.zero_()
        buffers.slots.fill_(-1)
        stream = torch.cuda.Stream(runner.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles what is compiled lazily, and lets libraries make their workspaces
                runner._decode_step(*key)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=runner.pool, stream=stream):
            self.result = runner._decode_step(*key)
        for tensor, value in saved:
            tensor.copy_(value)

    def replay(self) -> SampleResult:
        self.graph.replay()
        return self.result


@dataclass
class SentBack:
    """A step's results on their way to the host.  source: keeps the device's memory until they have arrived."""

    tokens: torch.Tensor
    extras: list[torch.Tensor] = field(default_factory=list)
    done: object | None = None
    source: torch.Tensor | None = None


@dataclass
class Launched:
    """A step under way.  rows: where the results of the plan's sampling work lie, in its order."""

    plan: Plan
    rows: list[int]
    sent: SentBack | None

    def read(self) -> tuple[list[int], list | None]:
        """Wait for the step. Its tokens, and per token, if any sequence asked: (log probability, rank, best ids, their log
        probabilities)."""
        if self.sent is None:
            return [], None
        if self.sent.done is not None:
            self.sent.done.synchronize()
        tokens = self.sent.tokens.tolist()
        extras = list(zip(*(tensor.tolist() for tensor in self.sent.extras), strict=True))
        return [tokens[row] for row in self.rows], [extras[row] for row in self.rows] if extras else None


