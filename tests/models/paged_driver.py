"""Runs a model through the paged cache as the engine would: several sequences, prompts in chunks, then decodes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import AttentionBatch

BLOCK_SIZE = 16


@dataclass
class Running:
    tokens: list[int]
    computed: int = 0
    table: list[int] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)  # [V], after each computed token


class PagedDriver:
    """Holds parameters, caches and a pool of shuffled blocks; `step` computes any ragged mix of tokens."""

    def __init__(self, model: nn.Module, params: Any, *, num_blocks: int = 64, max_blocks: int = 16):
        self.params = params
        self.caches = jax.tree.map(
            lambda s: jnp.full(s.shape, 7, s.dtype),  # stale values that nothing may see
            model.cache_shapes(num_blocks, BLOCK_SIZE, model.compute.dtype),
        )
        self.free = list(np.random.default_rng(0).permutation(np.arange(1, num_blocks)))
        self.max_blocks = max_blocks

        def forward(params, tokens, positions, caches, batch):
            hidden, caches = model.apply(params, tokens, positions, caches, batch)
            logits = model.apply(params, hidden, method="logits")
            return jax.nn.log_softmax(logits, axis=-1), caches

        self.forward = jax.jit(forward, donate_argnums=3)

    def step(self, work: Sequence[tuple[Running, int]], *, num_tokens: int, num_seqs: int) -> None:
        """Computes the next n known tokens of each, single tokens first; padded to the given shape."""
        tokens, positions = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
        kv_lens, starts = np.zeros(num_seqs, np.int32), np.zeros(num_seqs + 1, np.int32)
        tables = np.zeros((num_seqs, self.max_blocks), np.int32)
        row = 0
        for s, (sequence, n) in enumerate(work):
            end = sequence.computed + n
            while len(sequence.table) * BLOCK_SIZE < end:
                sequence.table.append(self.free.pop())
            tokens[row : row + n] = sequence.tokens[sequence.computed : end]
            positions[row : row + n] = np.arange(sequence.computed, end)
            kv_lens[s] = end
            tables[s, : len(sequence.table)] = sequence.table
            row += n
            starts[s + 1 :] = row
        decodes = sum(n == 1 for _, n in work)
        batch = AttentionBatch(
            kv_lens=jnp.asarray(kv_lens),
            block_tables=jnp.asarray(tables),
            cu_q_lens=jnp.asarray(starts),
            num_seqs=jnp.array([decodes, len(work)], jnp.int32),
            decode_only=decodes == len(work) and num_tokens == num_seqs,
        )
        logprobs, self.caches = self.forward(
            self.params, jnp.asarray(tokens), jnp.asarray(positions), self.caches, batch
        )
        rows = np.asarray(logprobs)
        for s, (sequence, n) in enumerate(work):
            sequence.logprobs.extend(rows[starts[s] : starts[s] + n])
            sequence.computed += n

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, chunk: int) -> list[Running]:
        """Continues all prompts together; one more starts every other step, and comes in `chunk` tokens at a time."""
        sequences = [Running(list(p)) for p in prompts]
        goals = [len(p) + new_tokens for p in prompts]
        step = 0
        while any(s.computed < goal - 1 for s, goal in zip(sequences, goals, strict=True)):
            started = [
                (s, min(chunk, len(s.tokens) - s.computed))
                for s, goal in zip(sequences[: step // 2 + 1], goals, strict=False)
                if s.computed < goal - 1
            ]
            work = sorted(started, key=lambda item: item[1] > 1)
            if work:
                decode_only = all(n == 1 for _, n in work)
                num_tokens = len(prompts) if decode_only else chunk * len(prompts)
                self.step(work, num_tokens=num_tokens, num_seqs=len(prompts))
            for sequence, _ in work:
                if sequence.computed == len(sequence.tokens):
                    sequence.tokens.append(int(sequence.logprobs[-1].argmax()))
            step += 1
        return sequences


def chosen_logprobs(sequence: Running) -> np.ndarray:
    """float32: of every token but the first, given those before it."""
    return np.array([lp[t] for lp, t in zip(sequence.logprobs, sequence.tokens[1:], strict=True)])
