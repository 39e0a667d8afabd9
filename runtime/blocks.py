"""The paged cache's bookkeeping: which blocks are free, who holds the others, and which hold a prefix worth finding again.

PagedAttention: Kwon et al. 2023, arXiv:2309.06180. Only numbers are handled here; the cache tensors belong to the program.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict


class BlockAllocator:
    """Hands out `num_blocks` cache blocks of `block_size` tokens, each with a reference count.

    A full block may be published under the hash of all tokens up to its end. It stays findable after its last owner has left,
    until the pool needs it: free blocks are reused in the order in which they were given back.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing taken) when fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
            forgotten = self._hash_of.pop(block, None)
            if forgotten is not None:
                del self._block_of[forgotten]
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give back one reference to each block; the tail of a sequence is reused before its more often shared beginning."""
        for block in reversed(blocks):
            if self.references[block] <= 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block findable; when the key is known already, the block found first stays the one that is shared."""
        if self.references[block] <= 0:
            raise ValueError(f"block {block} is published but nobody holds it")
        if key not in self._block_of and block not in self._hash_of:
            self._block_of[key], self._hash_of[block] = block, key

    def share(self, keys: list[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `keys`, with one more reference each."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self.references[block] += 1
            self._free.pop(block, None)
            found.append(block)
        return found


def block_keys(tokens: list[int], block_size: int, *, start: int = 0, parent: bytes = b"") -> list[bytes]:
    """The key of every full block of `tokens` from block `start` on: a hash of all tokens up to the block's end.

    parent: the key of block `start - 1`, or a salt that keeps the prefixes of different users apart.
    """
    keys = []
    for block in range(start, len(tokens) // block_size):
        content = array("q", tokens[block * block_size : (block + 1) * block_size]).tobytes()
        parent = hashlib.blake2b(content, key=parent[:64], digest_size=16).digest()
        keys.append(parent)
    return keys
