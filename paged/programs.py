"""What is compiled: pure functions of the weights, the device's state and what the host sends.

A step is two programs, so that the layers are compiled once for each of a step's shapes and the sampler once for each
number of rows and each of its variants. The first leaves the hidden states that are sampled from, `StepRows`, on the
device, where the last step's were: a program's kernels are in CUDA graphs, which XLA writes anew for a call whose
buffers have other addresses, and that takes longer than a small step.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import AttentionBatch
from models import begin_stream, head_params, settled
from paged import sampler
from paged.packing import SampledRows, StepShape
from paged.runner_shape import RunnerShape
from paged.sampler import SampleOutput, SlotState, Variant


class StepRows(NamedTuple):
    """What is sampled from. R is max_num_seqs; rows that a step has not are padding."""

    hidden: jax.Array  # [R, E]
    packed: jax.Array  # int32[3, R], SampledRows

    def written(self, hidden, packed, scratch: int) -> "StepRows":
        """In their place the rows hidden [S, E] and packed int32[3, S], and padding of the slot `scratch`."""
        padding = jnp.zeros((len(packed), len(self.hidden) - len(hidden)), jnp.int32).at[0].set(scratch)
        rows = jnp.concatenate([packed, padding], axis=1)
        return StepRows(lax.dynamic_update_slice(self.hidden, hidden, (0, 0)), rows)

    def first(self, count: int) -> "StepRows":
        return StepRows(self.hidden[:count], self.packed[:, :count])


class DeviceState(NamedTuple):
    """Donated to the programs that write it, and returned by them. `slots` below is max_num_seqs + 1: the last is
    scratch, which padding reads and writes."""

    caches: Any  # one per layer
    block_tables: jax.Array  # int32[slots, P]
    unfinished: jax.Array  # [largest T, E], the last prompt step's tokens after the last attention: for prompt logprobs
    rows: StepRows
    last_tokens: jax.Array  # int32[slots]
    sampling: SlotState


def forward_program(
    model: nn.Module, sizes: RunnerShape, shape: StepShape, params, caches, block_tables, unfinished, rows, *inputs: Any
) -> tuple[Any, jax.Array, jax.Array, StepRows]:
    """`layers`: the first four of the DeviceState, which it writes."""
    written, new = layers(model, sizes, shape, params, caches, block_tables, unfinished, *inputs)
    return *written, rows.written(*new, scratch=sizes.max_num_seqs)


def layers(
    model: nn.Module,
    sizes: RunnerShape,
    shape: StepShape,
    params,
    caches,
    block_tables,
    unfinished,
    last_tokens,
    packed,
) -> tuple[tuple[Any, jax.Array, jax.Array], StepRows]:
    """A step's layers, and what is sampled from after them, S rows. packed: int32[shape.packed_size]; the others as in
    DeviceState, whose first three it writes."""
    inputs = shape.split(packed)
    kv_lens, scratch = inputs.kv_lens, sizes.max_num_seqs
    grows = inputs.new_blocks > 0
    place = jnp.where(grows, inputs.slots, scratch), jnp.where(grows, (kv_lens - 1) // sizes.block_size, 0)
    if shape.S == 1:  # a scatter would see to it in a kernel of its own that the place is within
        block_tables = lax.dynamic_update_slice(block_tables, inputs.new_blocks[None], [i[0] for i in place])
    else:
        block_tables = block_tables.at[place].set(inputs.new_blocks)
    rows = jnp.arange(shape.T)
    if shape.decode_only:
        tokens, positions = last_tokens[inputs.slots], jnp.maximum(kv_lens - 1, 0)
    else:
        seq = jnp.minimum(jnp.searchsorted(inputs.cu_q_lens[1:], rows, side="right"), shape.S - 1)
        positions = jnp.maximum(kv_lens[seq] - inputs.cu_q_lens[seq + 1] + rows, 0)
        tokens = jnp.where(inputs.tokens < 0, last_tokens[inputs.slots[seq]], inputs.tokens)
    batch = AttentionBatch(
        kv_lens,
        block_tables[inputs.slots],
        inputs.cu_q_lens,
        inputs.num_seqs,
        shape.decode_only,
        model.compute.deterministic,
        model.new_arrivals(shape.S),
    )
    stream, caches = model.apply(params, tokens, positions, caches, batch, method="to_last_attention")
    num_rows = batch.num_tokens
    if not shape.decode_only:
        unfinished = lax.dynamic_update_slice(unfinished, settled(*stream), (0, 0))
        last = jnp.maximum(inputs.cu_q_lens[1:] - 1, 0)
        if shape.S < shape.T:  # only these rows are sampled from
            stream, num_rows = begin_stream(unfinished[last]), inputs.num_seqs[1]
    hidden = model.apply(params, stream, num_rows, method="from_last_attention")
    if shape.T <= shape.S and not shape.decode_only:
        hidden = hidden[last]
    return (caches, block_tables, unfinished), StepRows(hidden, shape.sampled_rows(packed))


def sample_program(
    model: nn.Module, sizes: RunnerShape, variant: Variant, count: int, head, rows: StepRows, *state: Any
) -> tuple[tuple[jax.Array, SlotState], SampleOutput]:
    """`sample` for the first `count` rows."""
    return sample(model, sizes, variant, head, rows.first(count), *state)


def sample(
    model: nn.Module, sizes: RunnerShape, variant: Variant, head, rows: StepRows, last_tokens, sampling: SlotState
) -> tuple[tuple[jax.Array, SlotState], SampleOutput]:
    """The head and the sampler. head: models.head_params; last_tokens and sampling as in DeviceState, which it writes.
    Rows of the output are in the order of plan.scheduled."""
    slots, kv_lens, samples = SampledRows(*rows.packed)
    sampled = next_tokens(model, sizes, variant, head, rows.hidden, sampling, slots, kv_lens)
    last_tokens = last_tokens.at[jnp.where(samples > 0, slots, sizes.max_num_seqs)].set(sampled.tokens)
    if variant == "full":
        sampling = sampler.count_tokens(sampling, slots, sampled.tokens, samples > 0)
    return (last_tokens, sampling), sampled


def next_tokens(
    model: nn.Module, sizes: RunnerShape, variant: Variant, params, hidden, sampling: SlotState, slots, positions
) -> SampleOutput:
    """The output head and the sampler: a token for each row of hidden [S, E]. slots, positions: int32[S], as
    sampler.sample has them."""
    if variant in ("greedy", "random"):
        best_tokens = partial(model.apply, params, hidden, method="best_tokens")
        tokens = sampler.tokens_without_logits(best_tokens, sampling, slots, positions, variant)
        if tokens is not None:
            return SampleOutput(tokens)
    logits = model.apply(params, hidden, method="logits")
    return sampler.sample(logits, sampling, slots, positions, variant, sizes.max_logprobs)


def chain_program(
    model: nn.Module, sizes: RunnerShape, shape: StepShape, params, state: DeviceState, packed
) -> tuple[DeviceState, jax.Array]:
    """Decode steps one after the other, one program. packed: int32[steps, shape.packed_size]; gives the tokens,
    int32[steps, S]."""

    head = head_params(params)

    def step(i, carry):
        (caches, block_tables, unfinished, rows, last_tokens, sampling), tokens = carry
        written, new = layers(model, sizes, shape, params, caches, block_tables, unfinished, last_tokens, packed[i])
        chosen, output = sample(model, sizes, "random", head, new, last_tokens, sampling)
        return DeviceState(*written, rows, *chosen), tokens.at[i].set(output.tokens)

    return lax.fori_loop(0, len(packed), step, (state, jnp.zeros((len(packed), shape.S), jnp.int32)))


def admit_program(block_tables: jax.Array, sampling: SlotState, packed: jax.Array) -> tuple[jax.Array, SlotState]:
    """Writes the rows of newly admitted requests. packed: int32[A, PACKED_WIDTH + P], slot first."""
    scalars, tables = packed[:, : sampler.PACKED_WIDTH], packed[:, sampler.PACKED_WIDTH :]
    return block_tables.at[packed[:, 0]].set(tables), sampler.write_slots(sampling, scalars)


def clear_program(caches: Any, blocks: jax.Array) -> Any:
    """Zeros in these blocks, int32[any], of all layers."""
    return jax.tree.map(lambda x: x.at[blocks].set(0), caches)


def score_program(model: nn.Module, max_logprobs: int, params, unfinished: jax.Array, rows: jax.Array) -> SampleOutput:
    """unfinished: as in DeviceState; rows int32[2, R]: a row of it, and the token that follows that."""
    stream, count = begin_stream(unfinished[rows[0]]), jnp.int32(rows.shape[1])
    hidden = model.apply(params, stream, count, method="from_last_attention")
    logits = model.apply(params, hidden, method="logits")
    return sampler.prompt_logprobs(logits, rows[1], max_logprobs)
