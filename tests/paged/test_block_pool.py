"""The pool against a model of it made of plain lists."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paged.block_pool import BlockPool, chain_hashes, root_hash

BLOCK = 2
ROOT = root_hash("")


def hashes_of(tokens: list[int], salt: str = "") -> list[bytes]:
    return chain_hashes(root_hash(salt), tokens, BLOCK)


def test_every_block_but_the_first_is_handed_out_once():
    pool = BlockPool(6)
    assert sorted(pool.allocate() for _ in range(5)) == [1, 2, 3, 4, 5]
    assert (pool.num_free, pool.num_used, pool.usage) == (0, 5, 1.0)
    with pytest.raises(RuntimeError, match="no block is free"):
        pool.allocate()
    pool.check()


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_a_pool_needs_a_block_beside_padding(num_blocks: int):
    with pytest.raises(ValueError, match="at least 2 blocks"):
        BlockPool(num_blocks)


def test_misuse_is_refused():
    pool = BlockPool(4)
    block = pool.allocate()
    pool.free([block])
    for misuse in (
        lambda: pool.free([block]),
        lambda: pool.free([0]),
        lambda: pool.register(block, ROOT),
        lambda: pool.forget([block]),
    ):
        with pytest.raises(ValueError, match="not in use"):
            misuse()
    pool.check()


def test_a_hash_names_the_tokens_before_it_the_salt_and_whole_blocks_only():
    hashes = hashes_of([1, 2, 3, 4, 5])
    assert len(hashes) == 2
    assert hashes == hashes_of([1, 2, 3, 4, 6])
    assert hashes[0] == hashes_of([1, 2, 9, 9])[0]
    assert hashes[1] not in hashes_of([9, 9, 3, 4])
    assert not set(hashes) & set(hashes_of([1, 2, 3, 4], salt="tenant"))
    assert hashes[1:] == chain_hashes(hashes[0], [3, 4], BLOCK)
    assert len(set(hashes_of([0, 1, 256, 0, 1, 0, 0, 1 << 16]))) == 4


def cached(pool: BlockPool, tokens: list[int]) -> list[int]:
    """A sequence that came and went; its table."""
    hashes = hashes_of(tokens)
    table = pool.take([], len(hashes))
    assert table is not None
    for block, block_hash in zip(table, hashes, strict=True):
        pool.register(block, block_hash)
    pool.free(table)
    return table


def test_a_finished_sequence_is_found_again_and_shared():
    pool = BlockPool(6)
    table = cached(pool, [1, 2, 3, 4])
    assert (pool.num_free, pool.num_cached) == (5, 2)
    hits = pool.lookup(hashes_of([1, 2, 3, 4, 5, 6]))
    assert hits == table
    first, second = pool.take(hits, 1), pool.take(hits, 0)
    assert first is not None
    assert (first[:2], second) == (table, table)
    assert [pool.references(b) for b in first] == [2, 2, 1]
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.free(first)
    assert [pool.references(b) for b in first] == [1, 1, 0]
    assert pool.num_cached == 0
    pool.check()


def test_a_gap_ends_the_prefix():
    pool = BlockPool(6)
    table = cached(pool, [1, 2, 3, 4, 5, 6])
    pool.take(table[:1] + table[2:], 0)
    for _ in range(3):
        pool.allocate()
    assert pool.lookup(hashes_of([1, 2, 3, 4, 5, 6])) == table[:1]


def test_least_recently_used_goes_first_its_tail_before_its_head_and_unhashed_before_all():
    pool = BlockPool(8)
    old = cached(pool, [1, 2, 3, 4])
    new = cached(pool, [5, 6, 7, 8])
    plain = pool.take([], 3)
    assert plain is not None
    pool.free(plain)
    used_again = pool.take(old, 0)
    assert used_again is not None
    pool.free(used_again)
    assert [pool.allocate() for _ in range(7)] == plain + new[::-1] + old[::-1]
    assert pool.lookup(hashes_of([1, 2])) == []


def test_what_does_not_fit_changes_nothing():
    pool = BlockPool(4)
    table = cached(pool, [1, 2, 3, 4])
    assert pool.take(table, 2) is None  # the two hits are of the three free blocks
    assert (pool.num_free, pool.num_cached) == (3, 2)
    assert pool.lookup(hashes_of([1, 2, 3, 4])) == table
    pool.check()


def test_of_two_equal_blocks_the_first_registered_stays():
    pool = BlockPool(4)
    (block_hash,) = hashes_of([1, 2])
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, block_hash)
    pool.register(second, block_hash)
    assert pool.lookup([block_hash]) == [first]
    pool.free([second])
    assert pool.num_cached == 0
    pool.free([first])
    assert pool.num_cached == 1
    pool.check()


def test_forgotten_and_reset_blocks_are_found_no_more():
    pool = BlockPool(8)
    hashes = hashes_of([1, 2, 3, 4])
    table = pool.take(cached(pool, [1, 2, 3, 4]), 0)
    assert table is not None
    pool.forget(table[1:])
    assert pool.lookup(hashes) == table[:1]
    cached(pool, [5, 6])
    pool.reset_prefix_cache()
    assert pool.lookup(hashes) == pool.lookup(hashes_of([5, 6])) == []
    assert (pool.num_cached, pool.num_used) == (0, 2)
    pool.free(table)
    assert (pool.num_cached, pool.num_free) == (0, 7)
    pool.check()


class PoolModel(RuleBasedStateMachine):
    """Sequences over a small vocabulary come, grow, are registered and go; the model keeps the free blocks in
    two lists and every block's content and holders by name."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(9)
        self.plain = list(range(1, 9))  # next to be reused first
        self.cached: list[int] = []  # least recently used first
        self.known: dict[tuple[int, ...], int] = {}  # a prefix that ends with a block's last token -> that block
        self.sequences: list[tuple[list[int], list[int]]] = []  # (tokens, table)

    def pop(self) -> int:
        block = self.plain.pop(0) if self.plain else self.cached.pop(0)
        self.known = {prefix: b for prefix, b in self.known.items() if b != block}
        return block

    def release(self, table: list[int]) -> None:
        for block in reversed(table):
            if not any(block in other for _, other in self.sequences):
                if block in self.known.values():
                    self.cached.append(block)
                else:
                    self.plain.insert(0, block)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=11))
    def begin(self, tokens: list[int]):
        expected = []
        while (prefix := tuple(tokens[: (len(expected) + 1) * BLOCK])) in self.known:
            if len(prefix) < (len(expected) + 1) * BLOCK:
                break
            expected.append(self.known[prefix])
        hits = self.pool.lookup(hashes_of(tokens))
        assert hits == expected
        num_new = -(-len(tokens) // BLOCK) - len(hits)
        table = self.pool.take(hits, num_new)
        still_free = [b for b in self.plain + self.cached if b not in hits]
        if num_new > len(still_free):
            assert table is None
            return
        self.cached = [b for b in self.cached if b not in hits]
        assert table == hits + [self.pop() for _ in range(num_new)]
        self.sequences.append((tokens, table))

    @precondition(lambda self: self.sequences and (self.plain or self.cached))
    @rule(data=st.data())
    def grow(self, data):
        tokens, table = data.draw(st.sampled_from(self.sequences))
        block = self.pool.allocate()
        assert block == self.pop()
        tokens += [0] * (len(table) * BLOCK - len(tokens) + 1)
        table.append(block)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def register(self, data):
        tokens, table = data.draw(st.sampled_from(self.sequences))
        hashes = hashes_of(tokens)
        count = data.draw(st.integers(0, len(hashes)))
        for i in range(count):
            self.pool.register(table[i], hashes[i])
            if table[i] not in self.known.values():
                self.known.setdefault(tuple(tokens[: (i + 1) * BLOCK]), table[i])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data):
        _, table = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.free(table)
        self.release(table)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def forget(self, data):
        _, table = data.draw(st.sampled_from(self.sequences))
        self.pool.forget(table)
        self.known = {prefix: b for prefix, b in self.known.items() if b not in table}

    @rule()
    def reset(self):
        self.pool.reset_prefix_cache()
        self.known = {}
        self.plain, self.cached = self.plain + self.cached, []

    @invariant()
    def counts_are_exact(self):
        self.pool.check()
        held = [block for _, table in self.sequences for block in table]
        assert [self.pool.references(b) for b in range(9)] == [held.count(b) for b in range(9)]
        assert self.pool.num_used == len(set(held))
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == len(self.plain) + len(self.cached) == 8 - len(set(held))

    @invariant()
    def shared_blocks_hold_the_same_tokens(self):
        contents: dict[int, tuple[int, ...]] = {}
        for tokens, table in self.sequences:
            for i, block in enumerate(table):
                prefix = tuple(tokens[: (i + 1) * BLOCK])
                assert contents.setdefault(block, prefix) == prefix

    def teardown(self):
        for _, table in self.sequences:
            self.pool.free(table)
        self.pool.check()
        assert self.pool.num_free == 8


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=150, stateful_step_count=60)


def test_counts_are_exact_after_a_million_operations():
    rng = random.Random(0)
    pool = BlockPool(200)
    chains = [hashes_of([prompt] * 2 * rng.randint(1, 12)) for prompt in range(60)]
    tables: list[tuple[list[bytes], list[int]]] = []
    holders = [0] * 200
    operations = 0
    while operations < 1_000_000:
        if rng.random() < 0.55:
            chain = rng.choice(chains)
            hits = pool.lookup(chain)
            table = pool.take(hits, len(chain) - len(hits))
            if table is not None:
                tables.append((chain, table))
                operations += len(table)
                for block in table:
                    holders[block] += 1
        if tables and rng.random() < 0.5:
            chain, table = tables[rng.randrange(len(tables))]
            for block, block_hash in zip(table, chain, strict=True):
                pool.register(block, block_hash)
            operations += len(table)
        if tables and (pool.num_free < 20 or rng.random() < 0.5):
            at = rng.randrange(len(tables))
            tables[at], tables[-1] = tables[-1], tables[at]
            table = tables.pop()[1]
            pool.free(table)
            operations += len(table)
            for block in table:
                holders[block] -= 1
        if rng.random() < 0.001:
            pool.check()
            assert [pool.references(b) for b in range(200)] == holders
    for _, table in tables:
        pool.free(table)
    pool.check()
    assert pool.num_free == 199
    assert pool.num_used == 0
    assert pool.num_cached > 0
