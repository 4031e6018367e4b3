"""The touch point: lent blocks and vLLM's own block pool."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

from swiftcache.vllm.pool import LentBlocks, Unsupported

BLOCKS = 12
TAIL = range(8, 12)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(BLOCKS, enable_caching=True, hash_block_size=4)


def fill(pool: BlockPool, count: int) -> list[BlockHash]:
    """A request came and went: its blocks are free, and kept for their prefix."""
    blocks = pool.get_new_blocks(count)
    hashes = [BlockHash(hashlib.sha256(bytes([n])).digest()) for n in range(count)]
    request = SimpleNamespace(block_hashes=hashes)
    pool.cache_full_blocks(request, blocks, 0, count, 4, 0)
    pool.free_blocks(reversed(blocks))
    return hashes


def all_that_can_be_had(pool: BlockPool) -> set[int]:
    blocks = pool.get_new_blocks(pool.get_num_free_blocks())
    ids = {block.block_id for block in blocks}
    pool.free_blocks(blocks)
    return ids


def test_a_lent_block_is_given_to_nobody_until_it_is_back(pool) -> None:
    lent = LentBlocks(pool)
    lent.take(TAIL)
    assert lent.free == BLOCKS - 1 - len(TAIL)
    assert all_that_can_be_had(pool) == set(range(1, 8))
    with pytest.raises(ValueError, match="free blocks"):
        pool.get_new_blocks(8)
    lent.put_back(TAIL)
    assert all_that_can_be_had(pool) == set(range(1, BLOCKS))


def test_no_prefix_is_found_in_a_lent_block(pool) -> None:
    hashes = fill(pool, BLOCKS - 1)
    found = [pool.get_cached_block(one, [0]) for one in hashes]
    assert all(found), "without this, the rest shows nothing"
    lent = LentBlocks(pool)
    lent.take(TAIL)
    left = [one for one in hashes if pool.get_cached_block(one, [0])]
    assert left == hashes[:7], "blocks 1 to 7"
    lent.put_back(TAIL)
    assert [one for one in hashes if pool.get_cached_block(one, [0])] == left, "nor when it is back"


def test_blocks_in_use_or_being_read_are_not_free(pool) -> None:
    lent = LentBlocks(pool)
    assert lent.are_free(TAIL)
    blocks = pool.get_new_blocks(BLOCKS - 1)
    assert not lent.are_free(TAIL)
    pool.free_blocks(blocks[:-1])
    assert not lent.are_free(TAIL), "one is in use"
    pool.unpin_blocks(blocks[-1:], lambda _: None)
    assert not lent.are_free(TAIL), "one may be read"
    assert lent.are_free(range(8, 11))


def test_the_prefix_cache_can_be_reset_while_blocks_are_lent(pool) -> None:
    fill(pool, 3)
    lent = LentBlocks(pool)
    lent.take(TAIL)
    assert pool.reset_prefix_cache()
    assert all_that_can_be_had(pool) == set(range(1, 8)), "they are lent still"
    # Its twin: blocks of requests are a reason to refuse.
    used = pool.get_new_blocks(1)
    assert not pool.reset_prefix_cache()
    pool.free_blocks(used)
    lent.put_back(TAIL)
    assert pool.reset_prefix_cache() and lent.free == BLOCKS - 1


@pytest.mark.parametrize("name", ["touch", "evict_blocks", "free_blocks", "get_num_free_blocks", "reset_prefix_cache"])
def test_a_pool_without_a_method_is_refused(pool, name) -> None:
    LentBlocks(pool)
    setattr(pool, name, None)
    with pytest.raises(Unsupported, match=rf"vLLM \S+ \(BlockPool\) lacks {name}\(\); SwiftCache knows"):
        LentBlocks(pool)


def test_a_pool_of_another_shape_is_refused(pool) -> None:
    del pool._reuse_watchers
    pool.blocks = pool.blocks[1:]
    with pytest.raises(Unsupported, match="blocks, a list of num_gpu_blocks, _reuse_watchers, a dictionary"):
        LentBlocks(pool)
    with pytest.raises(Unsupported, match="ref_cnt of a block"):
        LentBlocks(SimpleNamespace(blocks=[object()], num_gpu_blocks=1))
