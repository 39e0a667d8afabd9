"""What one step of a model computes: the packed tokens of a few sequences, and where their cache rows lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """The tokens of one step, packed one sequence after the other; every tensor is on the program's device.

    T tokens of B sequences; R of the T are wanted as logits; M blocks is the most that one sequence may own.
    Sequence b's queries are tokens `query_starts[b] : query_starts[b + 1]`; they are the last of its `context_lens[b]` tokens,
    and each sees every earlier one. A padding row has one query, a context of 0 and the slot -1: it writes nothing, and what it
    computes is never read.

    ids            int32 [T]     token ids
    positions      int32 [T]     position of each token in its sequence
    slots          int64 [T]     where the token's cache row goes: block * block_size + offset; -1 writes nothing
    query_starts   int32 [B+1]   first packed token of each sequence, and T
    context_lens   int32 [B]     tokens of the sequence in the cache after this step
    block_tables   int32 [B, M]  cache block of each `block_size` tokens of the sequence; entries past the context are arbitrary
    rows           int32 [R]     packed tokens whose logits are wanted
    max_query      int           longest query in the batch, known to the host; 1 means pure decode
    max_context    int           upper bound of context_lens, known to the host
    every          bool          whether `rows` are all T tokens in their order, known to the host
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    rows: torch.Tensor
    max_query: int
    max_context: int
    every: bool = False
