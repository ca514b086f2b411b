"""The least time that a step can take: its bytes over the measured bandwidth, its operations over the measured peak,
whichever is more (Williams et al., 2009). What a step must move is every weight once and the cache of every sequence in
it; what it must compute is two operations a weight and token, and attention. Of experts, those count that its tokens
go to, as many as are expected if each token goes to any of them alike. Where several devices share each layer, all is
of one of them, and what they say to each other takes no time."""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import ModelConfig
from paged.memory import local_size, token_bytes, tree_bytes
from scripts.bench.workload import Item

LONG_ENOUGH = 0.02  # seconds that a measurement of a ceiling lasts at least


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes a second, read and written together, of a device copy. flops: operations a second of a large
    matrix product in the model's dtype."""

    bandwidth: float
    flops: float

    def seconds(self, bytes_moved: float, operations: float) -> float:
        return max(bytes_moved / self.bandwidth, operations / self.flops)


@dataclass(frozen=True)
class Cost:
    """What the model costs one device, from its configuration and the weights as they are in memory.

    Attributes:
      shards: devices that share each layer.
      weight_bytes, weights: bytes and number of the weights that a step reads (an untied input embedding is not among
        them: a step gathers a few rows of it), with all experts.
      expert_bytes, expert_weights: those of them that experts have.
      head_weights: those of them that only tokens with logits pass through.
      kv_bytes: bytes of one token's keys and values in one layer, with the scales of eight-bit ones.
    """

    config: ModelConfig
    weight_bytes: int
    weights: int
    head_weights: int
    kv_bytes: int
    shards: int = 1
    expert_bytes: int = 0
    expert_weights: int = 0

    @classmethod
    def of(cls, config: ModelConfig, params: Any, cache_dtype: Any, shards: int = 1) -> "Cost":
        """params: arrays or their shapes, with their places on the devices."""
        leaves = jax.tree.leaves(params)
        embedding = config.vocab_size * config.hidden_size // shards
        gathered = 0 if config.tie_word_embeddings else embedding
        experts = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if _is_of_experts(path, x)]
        itemsize = max(leaves, key=lambda x: x.size).dtype.itemsize
        return cls(
            config,
            weight_bytes=tree_bytes(params) - gathered * itemsize,
            weights=sum(map(local_size, leaves)) - gathered,
            head_weights=embedding,
            kv_bytes=token_bytes(config, cache_dtype, shards),
            shards=shards,
            expert_bytes=tree_bytes(experts),
            expert_weights=sum(map(local_size, experts)),
        )

    def bytes_read(self, tokens: int) -> float:
        """Of weights, in a step with so many tokens."""
        return self.weight_bytes - self.expert_bytes * self._missed() ** tokens

    def weights_used(self) -> float:
        """By each token."""
        return self.weights - self.expert_weights * self._missed()

    def _missed(self) -> float:
        """The part of the experts that one token does not go to."""
        experts = self.config.experts
        return 0.0 if experts is None else 1 - experts.chosen / experts.count

    def cached_tokens_read(self, context: np.ndarray | Sequence[int]) -> int:
        """Tokens whose keys and values one token of each context attends to, summed over layers."""
        lengths = np.asarray(context, dtype=np.int64)
        windows = self.config.sliding_windows
        return sum(int(np.minimum(lengths, w).sum()) if w else int(lengths.sum()) for w in windows)

    def decode(self, context: np.ndarray | Sequence[int]) -> tuple[float, float]:
        """Bytes and operations of a step that adds a token to each sequence of these lengths."""
        read = self.cached_tokens_read(context)
        operations = 2 * self.weights_used() * len(context) + self.attention_flops(read)
        return self.bytes_read(len(context)) + read * self.kv_bytes, operations

    def attention_flops(self, pairs: int) -> int:
        """Of so many pairs of a token and one that it attends to, summed over layers: a product for the score, one for
        the value, in each query head of the device."""
        return 4 * (self.config.num_heads // self.shards) * self.config.head_dim * pairs

    def prefill(self, lengths: Sequence[int], tokens_a_step: int) -> tuple[float, float]:
        """Bytes and operations of computing prompts of these lengths in steps of so many tokens."""
        tokens = sum(lengths)
        steps = -(-tokens // tokens_a_step)
        pairs = sum(self.cached_tokens_read(np.arange(1, n + 1)) for n in lengths)
        body = 2 * (self.weights_used() - self.head_weights) * tokens
        head = 2 * self.head_weights * len(lengths)
        return steps * self.bytes_read(min(tokens, tokens_a_step)), body + head + self.attention_flops(pairs)


def _is_of_experts(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether the parameter has a matrix, or a bias, for each expert."""
    *_, name, kind = (key.key for key in path)
    return name in ("gate_up", "down") and leaf.ndim == {"kernel": 3, "bias": 2}[kind]


def ideal_seconds(
    items: Sequence[Item], cost: Cost, ceilings: Ceilings, max_num_seqs: int, tokens_a_step: int
) -> float:
    """The floor of a whole run: all prompts at the roofline, then decode steps at the roofline with as many sequences
    as may run at once, the next one taking the place of each that ends."""
    total = ceilings.seconds(*cost.prefill([len(item.prompt) for item in items], tokens_a_step))
    waiting = [item for item in items if item.output_len > 1][::-1]  # the prompt's step gives the first token
    running: list[tuple[int, int]] = []  # (step at which it ends, its length minus the step)
    step = 0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            item = waiting.pop()
            heapq.heappush(running, (step + item.output_len - 1, len(item.prompt) + 1 - step))
        context = np.fromiter((offset + step for _, offset in running), np.int64, len(running))
        total += ceilings.seconds(*cost.decode(context))
        step += 1
        while running and running[0][0] <= step:
            heapq.heappop(running)
    return total


def copy_bandwidth() -> float:
    """Bytes a second of adding one to an array in place: each byte is read and written."""
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    size, limit = 64 << 20, 1 << 30
    while True:
        array = jnp.zeros(size // 4, jnp.int32)
        seconds, array = _time_chain(add_one, array, repeats=8)
        del array
        if seconds * 8 >= LONG_ENOUGH or size >= limit:
            return 2 * size / seconds
        size *= 4


def matmul_flops(dtype: Any) -> float:
    """Operations a second of an n x n matrix product."""
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=x.dtype))
    n = 1024
    while True:
        x = jnp.full((n, n), 1 / n, dtype)
        seconds, _ = _time_chain(product, x, repeats=4)
        if seconds * 4 >= LONG_ENOUGH or n >= 8192:
            return 2 * n**3 / seconds
        n *= 2


def _time_chain(function: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int) -> tuple[float, jax.Array]:
    """Seconds of one call, in a chain of calls that each wait for the one before; the best of three chains."""
    x = jax.block_until_ready(function(x))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(repeats):
            x = function(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best, x
