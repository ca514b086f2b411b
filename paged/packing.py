"""One step's inputs as ONE int32 host buffer: packed on the host, sent in one copy, split inside jit."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import jax
import numpy as np

from paged.plan import StepPlan

FROM_DEVICE = -1  # an input token that only the device knows: the slot's last sampled one


class StepInputs[Array](NamedTuple):
    """Host (numpy) or device views of one packed buffer, all int32. Rows past the last sequence have the
    scratch slot and length 0."""

    tokens: Array  # [T], FROM_DEVICE for a decode
    cu_q_lens: Array  # [S + 1]
    new_blocks: Array  # [S], block appended to the table, 0 for none
    num_seqs: Array  # [2]: decodes, all
    slots: Array  # [S], the first of SampledRows
    kv_lens: Array  # [S], tokens of the sequence once this step's are in the cache
    samples: Array  # [S], 1 where the step samples the sequence's next token


class SampledRows[Array](NamedTuple):
    """Of StepInputs, what sampling needs."""

    slots: Array
    kv_lens: Array
    samples: Array


@dataclass(frozen=True)
class StepShape:
    """The bucketed shape of a step program: T tokens, S sequences."""

    T: int
    S: int
    decode_only: bool

    def __str__(self) -> str:
        return f"decode-{self.S}" if self.decode_only else f"prompt-{self.T}"

    @cached_property
    def sizes(self) -> StepInputs[int]:
        return StepInputs(self.T, self.S + 1, self.S, 2, self.S, self.S, self.S)

    @property
    def packed_size(self) -> int:
        return sum(self.sizes)

    def split[Array: (np.ndarray, jax.Array)](self, packed: Array) -> StepInputs[Array]:
        ends = list(accumulate(self.sizes))
        return StepInputs(*(packed[end - size : end] for size, end in zip(self.sizes, ends, strict=True)))

    def sampled_rows(self, packed: jax.Array) -> jax.Array:
        """int32[3, S]: the fields of SampledRows."""
        return packed[-3 * self.S :].reshape(3, self.S)


def pack(plan: StepPlan, shape: StepShape, scratch_slot: int) -> np.ndarray:
    """The plan as shape.packed_size int32s."""
    packed = np.zeros(shape.packed_size, np.int32)
    inputs = shape.split(packed)
    scheduled, count = plan.scheduled, len(plan.decodes) + len(plan.prefills)
    inputs.tokens[:] = FROM_DEVICE
    inputs.slots[:] = scratch_slot
    inputs.slots[:count] = [s.request.slot for s in scheduled]
    inputs.kv_lens[:count] = [s.start + s.num_tokens for s in scheduled]
    inputs.new_blocks[:count] = [s.new_block for s in scheduled]
    inputs.samples[:count] = [s.samples for s in scheduled]
    inputs.num_seqs[:] = len(plan.decodes), count
    num_decodes = len(plan.decodes)
    inputs.cu_q_lens[: num_decodes + 1] = np.arange(num_decodes + 1)
    row = num_decodes
    for i, chunk in enumerate(plan.prefills, start=num_decodes + 1):
        end = row + chunk.num_tokens
        inputs.tokens[row:end] = chunk.request.token_slice(chunk.start, chunk.start + chunk.num_tokens)
        inputs.cu_q_lens[i] = row = end
    inputs.cu_q_lens[count + 1 :] = row
    return packed


def buckets(smallest: int, largest: int, growth: int = 2) -> tuple[int, ...]:
    """smallest, smallest * growth, ... and largest itself."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= growth
    return (*sizes, largest)


def at_least(sizes: tuple[int, ...], needed: int) -> int:
    return next(size for size in sizes if size >= needed)
