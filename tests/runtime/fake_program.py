"""A program small enough to think about: one attention layer in float64 over the paged cache, random weights.

Its logits depend on every earlier token and its place, so a wrong slot, position, block table or batch boundary shows at once.
"""

import torch


class FakeProgram:
    dtype, draws = torch.float64, False

    def __init__(self, vocab_size=50, width=16, seed=0, device="cpu", supports_graphs=False):
        self.device, self.vocab_size, self.width, self.supports_graphs = torch.device(device), vocab_size, width, supports_graphs
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device)

        self.embedding, self.head = weight(vocab_size, width), weight(width, vocab_size)
        self.q, self.k, self.v = weight(width, width), weight(width, width), weight(width, width)
        self.frequencies = weight(width)
        self.cache_bytes_per_token = 2 * width * 8
        self.steps = []

    def allocate_cache(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        # one row more than there are slots: slot -1 writes there
        self.keys = torch.full((num_blocks * block_size + 1, self.width), torch.nan, dtype=torch.float64, device=self.device)
        self.values = self.keys.clone()

    def forward(self, batch):
        self.steps.append((len(batch.context_lens), batch.max_query))
        x = self.embedding[batch.ids.long()] + torch.sin(batch.positions[:, None] * self.frequencies)
        self.keys[batch.slots], self.values[batch.slots] = x @ self.k, x @ self.v
        token = torch.arange(len(batch.ids), device=self.device, dtype=torch.int32)
        owner = torch.searchsorted(batch.query_starts[1:].contiguous(), token, right=True)
        place = torch.arange(min(batch.max_context, batch.block_tables.shape[1] * self.block_size), device=self.device)
        slots = batch.block_tables[owner][:, place // self.block_size].long() * self.block_size + place % self.block_size
        seen = (place <= batch.positions[:, None]) & (place < batch.context_lens[owner][:, None])
        slots = torch.where(seen, slots, 0)
        scores = torch.einsum("td,tcd->tc", x @ self.q, torch.where(seen[..., None], self.keys[slots], 0)) / self.width
        weights = torch.where(seen, scores, -1e30).softmax(-1)
        x = x + torch.einsum("tc,tcd->td", weights, torch.where(seen[..., None], self.values[slots], 0))
        return (x[batch.rows.long()] @ self.head / self.width).float()
