"""Tokens that a program draws where it makes its logits, against those that are drawn from the logits in memory."""

from types import SimpleNamespace

import torch

from fusec.runtime.batch import Batch
from fusec.runtime.draw import settle
from fusec.runtime.drawing import EMPTY, Drawing, places
from fusec.runtime.sampling import Variant, sample, seed_words


def decode_batch(count: int, vocab_size: int, device, seed: int) -> Batch:
    """`count` sequences of one token each, in pages of 4."""
    generator = torch.Generator().manual_seed(seed)
    ints = torch.arange(count + 1, dtype=torch.int32, device=device)
    ids = torch.randint(0, vocab_size, (count,), generator=generator, dtype=torch.int32).to(device)
    return Batch(ids=ids, positions=torch.zeros_like(ids), slots=ints[:-1].long() * 4, query_starts=ints,
                 context_lens=torch.ones_like(ids), block_tables=ints[:-1, None].contiguous(), rows=ints[:-1], max_query=1,
                 max_context=64, every=True)  # fmt: skip


def parameters(count: int, device):
    """Rows of every temperature, some of them greedy."""
    heat = torch.tensor([0.7, 0.0, 1.0, 3.0])[torch.arange(count) % 4]
    low, high = torch.tensor([seed_words(row) for row in range(count)], dtype=torch.int32).T.contiguous()
    return SimpleNamespace(temperature=heat.to(device), seed_low=low.to(device), seed_high=high.to(device))


def check_drawing(program, count: int, noise: bool, seed: int = 0) -> list[int]:
    """Equal tokens, but for ties in the last bit of the noise; a row of NaN gives -1; places are left empty. One
    row's logits are stored all the same. Returns them."""
    device = program.device
    assert program.draws
    program.allocate_cache(count, 4)
    batch = decode_batch(count, program.vocab_size, device, seed)
    params, lengths = parameters(count, device), torch.arange(count, dtype=torch.int32, device=device) + 5
    logits = program.forward(batch)
    expected = sample(logits.cpu(), SimpleNamespace(**{k: v.cpu() for k, v in vars(params).items()}), lengths.cpu(),
                      Variant(int(noise))).tokens  # fmt: skip
    best = places(count, device)
    again = program.forward(batch, Drawing.of(params, lengths, best, noise=noise))
    if count == 1:
        assert torch.equal(again, logits) and (best == EMPTY).all()
        return expected.tolist()
    assert again is None
    tokens = settle(best, count).cpu()
    assert (best == EMPTY).all()
    assert (tokens != expected).sum() <= (1 if noise else 0), (tokens, expected)
    return tokens.tolist()
