"""The block allocator: no leak, no double owner, prefixes found again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusec.runtime.blocks import BlockAllocator, block_keys


def test_allocate_and_release():
    pool = BlockAllocator(4, 16)
    assert pool.blocks_for(0) == 0 and pool.blocks_for(16) == 1 and pool.blocks_for(17) == 2
    blocks = pool.allocate(3)
    assert sorted(blocks) == [0, 1, 2] and pool.num_used == 3
    assert pool.allocate(2) is None and pool.num_used == 3
    pool.release(blocks)
    assert pool.num_used == 0
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(blocks[:1])


def test_prefix_outlives_its_owner_until_the_pool_needs_it():
    pool, keys = BlockAllocator(4, 2), block_keys([1, 2, 3, 4, 5], 2)
    assert len(keys) == 2
    blocks = pool.allocate(2)
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    assert pool.share(keys) == blocks and pool.num_used == 2
    assert pool.share(keys) == blocks
    pool.release(blocks)
    pool.release(blocks)
    assert pool.allocate(4) is not None and pool.share(keys) == []


def test_keys_depend_on_everything_before_and_on_the_salt():
    keys = block_keys([1, 2, 3, 4], 2)
    assert block_keys([9, 2, 3, 4], 2)[1] != keys[1]
    assert block_keys([1, 2, 3, 4], 2, parent=b"someone else")[0] != keys[0]
    assert block_keys([1, 2, 3, 4, 5], 2, start=1, parent=keys[0]) == keys[1:]


@given(st.lists(st.tuples(st.sampled_from(["allocate", "release", "share", "publish"]), st.integers(0, 5)), max_size=60))
def test_every_block_is_free_or_owned(moves):
    pool, held = BlockAllocator(6, 2), []
    keys = block_keys(list(range(12)), 2)
    for move, number in moves:
        if move == "allocate":
            blocks = pool.allocate(number)
            assert (blocks is None) == (number > 6 - len({block for owned in held for block in owned}))
            held += [blocks] if blocks else []
        elif move == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif move == "share":
            held += [shared] if (shared := pool.share(keys[:number])) else []
        elif move == "publish" and held:
            pool.publish(held[-1][0], keys[number])
        owned = [block for blocks in held for block in blocks]
        assert pool.num_used == len(set(owned))
        assert [owned.count(block) for block in range(6)] == pool.references
    for blocks in held:
        pool.release(blocks)
    assert pool.num_free == 6
