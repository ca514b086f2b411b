"""The cache's blocks: who holds them, which are free, and which hold a prefix that another request can use."""

from array import array
from collections.abc import Sequence
from hashlib import sha256

_LIST_ENDS = 0  # block 0 belongs to padding and is never handed out: it is the free list's head and tail


def root_hash(salt: str) -> bytes:
    """What the first block of a sequence is chained to. Sequences of different salts never share a block."""
    return sha256(salt.encode()).digest()


def chain_hashes(parent: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """A hash for every full block of `tokens` (int32 values), each of (the hash before it, the block's tokens).

    Equal hashes mean equal tokens at equal positions after equal prefixes: SHA-256, so nobody can make two
    prompts meet in one block.
    """
    packed = array("i", tokens)
    width = block_size * packed.itemsize
    data = packed.tobytes()
    hashes = []
    for start in range(0, len(data) - width + 1, width):
        parent = sha256(parent + data[start : start + width]).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """`num_blocks` blocks, of which 1..num_blocks-1 are handed out, counted by reference and taken back.

    A block is used (someone refers to it) or free; a free one may be cached (the prefix index knows what it holds,
    so a later request can take it up again). Used + free = num_blocks - 1, always.

    Free blocks stand in one doubly linked list and are reused from its front: first those not cached, then the
    cached ones, least recently used first. Every operation is O(1) a block.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks (one is padding's), not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1  # what can be allocated now
        self.num_cached = 0  # of these, in the index
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._next = [*range(1, num_blocks), _LIST_ENDS]
        self._previous = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    @property
    def usage(self) -> float:
        """Fraction of the blocks that someone refers to."""
        return self.num_used / (self.num_blocks - 1)

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self) -> int:
        """A block for the caller to write; what it held before is forgotten. The pool must have a free one."""
        block = self._next[_LIST_ENDS]
        if block == _LIST_ENDS:
            raise RuntimeError("no block is free")
        self._unlink(block)
        self._forget(block)
        self._references[block] = 1
        return block

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest indexed prefix of this chain; take() them before anything else."""
        blocks = []
        for block_hash in hashes:
            block = self._index.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take(self, hits: list[int], num_new: int) -> list[int] | None:
        """A table: the blocks lookup() found, and `num_new` fresh ones. None, and nothing done, if it does not fit."""
        references = self._references
        if num_new + sum(not references[block] for block in hits) > self.num_free:
            return None
        for block in hits:
            if not references[block]:
                self._unlink(block)
            references[block] += 1
        return hits + [self.allocate() for _ in range(num_new)]

    def register(self, block: int, block_hash: bytes) -> None:
        """Offers a full, used block to the index. Where another already holds the same tokens, that one stays."""
        if not self._references[block]:
            raise ValueError(f"block {block} is not in use")
        if self._hashes[block] is None and block_hash not in self._index:
            self._index[block_hash] = block
            self._hashes[block] = block_hash

    def free(self, table: Sequence[int]) -> None:
        """Drops one reference to each block of a sequence; its last blocks will be reused before its first ones."""
        for block in reversed(table):
            references = self._references[block] - 1
            if references < 0 or block == _LIST_ENDS:
                raise ValueError(f"block {block} is not in use")
            self._references[block] = references
            if references == 0:
                self._link(block)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds it."""
        return self._references[block] == 0

    def forget(self, blocks: Sequence[int]) -> None:
        """Takes used blocks out of the index, because what they hold cannot be relied on. Their holders keep them."""
        for block in blocks:
            if not self._references[block]:
                raise ValueError(f"block {block} is not in use")
            self._forget(block)

    def reset_prefix_cache(self) -> None:
        """Empties the index. Used blocks stay with their holders; free ones are cached no more."""
        self._hashes = [None] * self.num_blocks
        self._index.clear()
        self.num_cached = 0

    def _forget(self, block: int) -> None:
        """Takes a block that is not in the list out of the index."""
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._index[block_hash]
            self._hashes[block] = None

    def _link(self, block: int) -> None:
        """To the back of the list if the index knows the block, else to the front."""
        if self._hashes[block] is None:
            before, after = _LIST_ENDS, self._next[_LIST_ENDS]
        else:
            before, after = self._previous[_LIST_ENDS], _LIST_ENDS
            self.num_cached += 1
        self._next[before] = self._previous[after] = block
        self._previous[block], self._next[block] = before, after
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1
        self.num_cached -= self._hashes[block] is not None

    def check(self) -> None:
        """Walks everything, O(num_blocks), and raises AssertionError if any two counts disagree."""
        listed: list[int] = []
        before, block = _LIST_ENDS, self._next[_LIST_ENDS]
        while block != _LIST_ENDS:
            assert self._previous[block] == before, f"the list is torn between {before} and {block}"
            assert len(listed) < self.num_blocks, "the list is a circle"
            listed.append(block)
            before, block = block, self._next[block]
        assert self._previous[_LIST_ENDS] == before, "the list's end is lost"
        unused = [b for b in range(1, self.num_blocks) if self._references[b] == 0]
        assert sorted(listed) == unused, "the list and the reference counts disagree"
        assert self.num_free == len(listed)
        assert self.num_cached == sum(self._hashes[b] is not None for b in listed)
        kinds = [self._hashes[b] is not None for b in listed]
        assert kinds == sorted(kinds), "a cached block stands before another"
        assert {b: h for h, b in self._index.items()} == {b: h for b, h in enumerate(self._hashes) if h is not None}
