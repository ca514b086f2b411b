"""Runs steps on the device: holds the weights and the device state, the compiled programs, and no policy."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import AttentionBatch
from models import CACHE, sharded
from paged import sampler
from paged.compiler import compile_all
from paged.packing import StepShape, at_least, pack
from paged.plan import StepPlan
from paged.program_store import ProgramStore
from paged.request import Request
from paged.sampler import VARIANTS, SampleOutput, SlotState, Variant

logger = logging.getLogger(__name__)
ADMIT_ROWS = 8  # requests whose slots one call writes
LARGEST_CHAINED = 32  # sequences: with more, a step takes longer than its call
SCORE_ROWS = 64  # prompt positions whose logprobs one call computes


class DeviceState(NamedTuple):
    """Donated to every step and returned by it. `slots` below is max_num_seqs + 1: the last is scratch, which
    padding reads and writes."""

    caches: Any  # one per layer
    block_tables: jax.Array  # int32[slots, P]
    last_tokens: jax.Array  # int32[slots]
    sampling: SlotState


class StepOutput(NamedTuple):
    sampled: SampleOutput  # rows in the order of plan.scheduled
    hidden: jax.Array | None  # [largest T, E], of a "full" prompt step: what prompt logprobs are made from


@dataclass(frozen=True)
class RunnerShape:
    """Every size that a compiled program depends on."""

    num_blocks: int
    block_size: int
    blocks_per_seq: int
    max_num_seqs: int
    vocab_size: int
    max_logprobs: int
    decode_sizes: tuple[int, ...]  # buckets of S
    prompt_sizes: tuple[int, ...]  # buckets of T
    variants: tuple[Variant, ...]  # of the sampler, the cheapest first and "full" last
    cache_dtype: Any
    chain: int = 1  # decode steps that one call may run, of batches so small that a call costs more than a step

    @property
    def steps(self) -> list[StepShape]:
        prompts = [StepShape(T, self.max_num_seqs, decode_only=False) for T in self.prompt_sizes]
        return [StepShape(S, S, decode_only=True) for S in self.decode_sizes] + prompts

    @property
    def largest_steps(self) -> list[StepShape]:
        """The largest decode step and the largest prompt step: no other needs more memory."""
        return [self.steps[len(self.decode_sizes) - 1], self.steps[-1]]

    def variants_of(self, step: StepShape) -> tuple[Variant, ...]:
        """Of a step's sampler. Beside a prompt's products its noise is nothing: greedy ones need none of their own."""
        return self.variants if step.decode_only else self.variants[-2:]

    @property
    def chained(self) -> list[StepShape]:
        """The steps that a call may run several of. Their sampler is "random"."""
        if self.chain == 1 or "random" not in self.variants:
            return []
        return [StepShape(S, S, decode_only=True) for S in self.decode_sizes if S <= LARGEST_CHAINED]


class PackedStep(NamedTuple):
    """A plan on its way to the device. What it was packed from may change."""

    plan: StepPlan
    shape: StepShape
    variant: Variant
    packed: np.ndarray


class StepHandle(NamedTuple):
    """A dispatched call, whose outputs are on their way to the host."""

    plans: list[StepPlan]
    sampled: SampleOutput  # of one plan; of several, tokens alone, int32[plans, S]
    prompt_scores: list[tuple[Request, range, SampleOutput]]  # of prompt positions; one row each, then padding

    def sampled_of(self, index: int, outputs: SampleOutput) -> SampleOutput:
        """Of plan `index`, from the `sampled` that came to the host."""
        return outputs if len(self.plans) == 1 else SampleOutput(outputs.tokens[index])


class Runner:
    def __init__(self, model: nn.Module, params: Any, shape: RunnerShape, cache_dir: str | None = None):
        self.model, self.params, self.shape = model, params, shape
        self._cache_dir = cache_dir
        self._steps: dict[tuple[StepShape, Variant], Any] = {}
        self._chains: dict[StepShape, Any] = {}
        self._admit: Any = None
        self._admit_full: Any = None
        self._score: Any = None
        self.state: Any = None  # a DeviceState, once compiled
        self._ranks = variant_ranks(shape)
        mesh = model.compute.mesh
        self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def state_shapes(self) -> DeviceState:
        """A DeviceState of jax.ShapeDtypeStruct."""
        s, slots = self.shape, self.shape.max_num_seqs + 1
        caches = self.model.cache_shapes(s.num_blocks, s.block_size, s.cache_dtype)
        sampling = sampler.slot_state_shapes(slots, s.vocab_size)
        return DeviceState(
            caches=sharded(caches, self.model.compute.mesh, CACHE),
            block_tables=self._shape((slots, s.blocks_per_seq)),
            last_tokens=self._shape((slots,)),
            sampling=jax.tree.map(lambda x: self._shape(x.shape, x.dtype), sampling),
        )

    def _shape(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        """Of an array that every device has."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere)

    def _send(self, tree: Any) -> Any:
        """Host arrays to every device."""
        return jax.device_put(tree, self._everywhere)

    def reset_state(self) -> None:
        """Empty caches and slots: at start, and after a step that failed and took its donated buffers with it."""
        self.state = None  # first let go of what is left of the old one
        self.state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self.state_shapes())

    # ---- programs -------------------------------------------------------------------------------------------

    def lower_step(self, shape: StepShape, variant: Variant) -> jax.stages.Lowered:
        step = partial(step_program, self.model, self.shape, shape, variant)
        return self._lower(step, (shape.packed_size,))

    def _lower_chain(self, shape: StepShape) -> jax.stages.Lowered:
        chain = partial(chain_program, self.model, self.shape, shape)
        return self._lower(chain, (self.shape.chain, shape.packed_size))

    def _lower(self, step: Callable, packed: tuple[int, ...]) -> jax.stages.Lowered:
        state = self.state_shapes()
        placed = jax.tree.map(lambda x: x.sharding, state), self._everywhere
        program = jax.jit(step, donate_argnums=1, out_shardings=placed)
        return program.lower(_shapes(self.params), state, self._shape(packed))

    def compile_steps(self, keys: Sequence[tuple[StepShape, Variant]]) -> dict[tuple[StepShape, Variant], Any]:
        programs = compile_all(self.step_programs(keys), "step programs", self._store)
        return dict(zip(keys, programs.values(), strict=True))

    def step_programs(self, keys: Sequence[tuple[StepShape, Variant]]) -> dict[str, Callable[[], jax.stages.Lowered]]:
        return {f"{shape}-{variant}": partial(self.lower_step, shape, variant) for shape, variant in keys}

    @cached_property
    def _store(self) -> ProgramStore:
        mesh = self.model.compute.mesh
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        weights = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), self.params)
        return ProgramStore.of(self._cache_dir, devices, self.model.config, self.model.compute, self.shape, weights)

    def compile(self) -> None:
        """Compiles everything that serving will ever call."""
        s = self.shape
        keys = [(shape, variant) for shape in s.steps for variant in s.variants_of(shape)]
        chains = {f"{shape}-chain": partial(self._lower_chain, shape) for shape in s.chained}
        programs = compile_all(self.step_programs(keys) | chains, "step programs", self._store)
        self._steps = dict(zip(keys, programs.values(), strict=False))
        self._chains = {shape: programs[f"{shape}-chain"] for shape in s.chained}
        self._admit, self._admit_full, self._score = compile_all(
            self.small_programs(), "small programs", self._store
        ).values()
        self.reset_state()

    def small_programs(self) -> dict[str, Callable[[], jax.stages.Lowered]]:
        """Those that are no steps, by name: two that admit a request, and one that computes prompt logprobs."""
        state, s = self.state_shapes(), self.shape
        packed = self._shape((ADMIT_ROWS, sampler.PACKED_WIDTH + s.blocks_per_seq))
        row = jax.tree.map(lambda x: self._shape(x.shape, x.dtype), sampler.full_row_shapes(s.vocab_size))
        hidden = self._shape((s.prompt_sizes[-1], self.model.config.hidden_size), self.model.compute.dtype)
        scoring = partial(score_program, self.model, s.max_logprobs)
        admit = jax.jit(admit_program, donate_argnums=(0, 1), out_shardings=self._everywhere).lower
        admit_full = jax.jit(sampler.write_full_slot, donate_argnums=0, out_shardings=self._everywhere).lower
        score = jax.jit(scoring, out_shardings=self._everywhere).lower
        return {
            "admit": partial(admit, state.block_tables, state.sampling, packed),
            "admit_full": partial(admit_full, state.sampling, self._shape(()), row),
            "score": partial(score, _shapes(self.params), hidden, self._shape((2, SCORE_ROWS))),
        }

    def memory_analysis(self) -> dict[tuple[StepShape, Variant], Any]:
        return {key: program.memory_analysis() for key, program in self._steps.items()}

    # ---- serving --------------------------------------------------------------------------------------------

    def pack(self, plan: StepPlan, shape: StepShape | None = None) -> PackedStep:
        """For execution after those packed before it; in `shape`, or the smallest that fits. Its sampler is the
        cheapest that serves every request of the step."""
        shape = shape or self._bucket(plan)
        packed = pack(plan, shape, scratch_slot=self.shape.max_num_seqs)
        for request in plan.admitted:
            self._ranks[request.slot] = VARIANTS.index(sampler.variant_of(request.sampling_params))
        rank = self._ranks[shape.split(packed).slots].max()
        variant = next(v for v in self.shape.variants_of(shape) if VARIANTS.index(v) >= rank)
        return PackedStep(plan, shape, variant, packed)

    def chain_length(self, step: PackedStep) -> int:
        """How many steps like this one call runs, if there are as many; else 1."""
        return self.shape.chain if step.shape in self._chains and step.variant != "full" else 1

    def execute(self, steps: Sequence[PackedStep]) -> list[StepHandle]:
        """Dispatches steps and the copies of their outputs; returns without waiting for either."""
        if len(steps) > 1 and len(steps) == self.chain_length(steps[0]):
            return [self._execute_chain(steps)]
        return [self._execute(step) for step in steps]

    def _execute(self, step: PackedStep) -> StepHandle:
        self._write_slots(step.plan.admitted)
        program = self._steps[step.shape, step.variant]
        self.state, output = program(self.params, self.state, self._send(step.packed))
        scores = [] if output.hidden is None else list(self._score_prompts(step.plan, output.hidden))
        for array in jax.tree.leaves((output.sampled, [arrays for _, _, arrays in scores])):
            array.copy_to_host_async()
        return StepHandle([step.plan], output.sampled, scores)

    def _execute_chain(self, steps: Sequence[PackedStep]) -> StepHandle:
        packed = self._send(np.stack([step.packed for step in steps]))
        self.state, tokens = self._chains[steps[0].shape](self.params, self.state, packed)
        tokens.copy_to_host_async()
        return StepHandle([step.plan for step in steps], SampleOutput(tokens), [])

    def _bucket(self, plan: StepPlan) -> StepShape:
        if not plan.prefills:
            S = at_least(self.shape.decode_sizes, len(plan.decodes))
            return StepShape(S, S, decode_only=True)
        T = at_least(self.shape.prompt_sizes, plan.num_tokens)
        return StepShape(T, self.shape.max_num_seqs, decode_only=False)

    def _write_slots(self, admitted: list[Request]) -> None:
        s = self.shape
        for first in range(0, len(admitted), ADMIT_ROWS):
            packed = np.zeros((ADMIT_ROWS, sampler.PACKED_WIDTH + s.blocks_per_seq), np.int32)
            packed[:, 0] = s.max_num_seqs
            for row, request in zip(packed, admitted[first : first + ADMIT_ROWS], strict=False):
                row[: sampler.PACKED_WIDTH] = sampler.pack_scalars(
                    request.slot, request.sampling_params, request.seed, request.num_prompt_tokens
                )
                row[sampler.PACKED_WIDTH :][: len(request.block_table)] = request.block_table
            tables, sampling = self._admit(self.state.block_tables, self.state.sampling, self._send(packed))
            self.state = self.state._replace(block_tables=tables, sampling=sampling)
        for request in admitted:
            if sampler.needs_full_row(request.sampling_params):
                arrays = sampler.full_row(
                    request.sampling_params,
                    request.prompt_token_ids,
                    request.output_token_ids,
                    request.stop_token_ids,
                    s.vocab_size,
                )
                slot = self._send(np.int32(request.slot))
                sampling = self._admit_full(self.state.sampling, slot, self._send(arrays))
                self.state = self.state._replace(sampling=sampling)

    def _score_prompts(self, plan: StepPlan, hidden: jax.Array) -> Iterator[tuple[Request, range, SampleOutput]]:
        """Logprobs of the prompt tokens that follow this step's, for the requests that ask for them."""
        row = len(plan.decodes)
        for chunk in plan.prefills:
            request, first = chunk.request, chunk.start + 1
            stop = min(first + chunk.num_tokens, request.num_prompt_tokens)
            if request.sampling_params.prompt_logprobs is not None:
                for start in range(first, stop, SCORE_ROWS):
                    count = min(SCORE_ROWS, stop - start)
                    rows = np.zeros((2, SCORE_ROWS), np.int32)
                    rows[0, :count] = np.arange(count) + row + start - first
                    rows[1, :count] = request.prompt_token_ids[start : start + count]
                    scored = self._score(self.params, hidden, self._send(rows))
                    yield request, range(start, start + count), scored
            row += chunk.num_tokens


def variant_ranks(shape: RunnerShape) -> np.ndarray:
    """int[slots]: by slot, which of VARIANTS is the cheapest that serves the request in it."""
    return np.zeros(shape.max_num_seqs + 1, int)


def step_program(
    model: nn.Module, sizes: RunnerShape, shape: StepShape, variant: Variant, params, state: DeviceState, packed
) -> tuple[DeviceState, StepOutput]:
    """Forward and sampling of one step, one program. packed: int32[shape.packed_size]."""
    inputs = shape.split(packed)
    kv_lens, scratch = inputs.kv_lens, sizes.max_num_seqs
    grows = inputs.new_blocks > 0
    block_tables = state.block_tables.at[
        jnp.where(grows, inputs.slots, scratch), jnp.where(grows, (kv_lens - 1) // sizes.block_size, 0)
    ].set(inputs.new_blocks)
    rows = jnp.arange(shape.T)
    if shape.decode_only:
        tokens, positions = state.last_tokens[inputs.slots], jnp.maximum(kv_lens - 1, 0)
    else:
        seq = jnp.minimum(jnp.searchsorted(inputs.cu_q_lens[1:], rows, side="right"), shape.S - 1)
        positions = jnp.maximum(kv_lens[seq] - inputs.cu_q_lens[seq + 1] + rows, 0)
        tokens = jnp.where(inputs.tokens < 0, state.last_tokens[inputs.slots[seq]], inputs.tokens)
    batch = AttentionBatch(
        kv_lens,
        block_tables[inputs.slots],
        inputs.cu_q_lens,
        inputs.num_seqs,
        shape.decode_only,
        model.compute.deterministic,
    )
    hidden, caches = model.apply(params, tokens, positions, state.caches, batch)
    last = hidden if shape.decode_only else hidden[jnp.maximum(inputs.cu_q_lens[1:] - 1, 0)]
    sampled = next_tokens(model, sizes, variant, params, last, state.sampling, inputs.slots, kv_lens)
    samples = inputs.samples > 0
    last_tokens = state.last_tokens.at[jnp.where(samples, inputs.slots, scratch)].set(sampled.tokens)
    sampling = state.sampling
    if variant == "full":
        sampling = sampler.count_tokens(sampling, inputs.slots, sampled.tokens, samples)
    state = DeviceState(caches, block_tables, last_tokens, sampling)
    if variant != "full" or shape.decode_only:
        return state, StepOutput(sampled, None)
    return state, StepOutput(sampled, jnp.pad(hidden, ((0, sizes.prompt_sizes[-1] - shape.T), (0, 0))))


def next_tokens(
    model: nn.Module, sizes: RunnerShape, variant: Variant, params, hidden, sampling: SlotState, slots, positions
) -> SampleOutput:
    """The output head and the sampler: a token for each row of hidden [S, E]. slots, positions: int32[S], as
    sampler.sample has them."""
    if variant != "full":
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

    def step(i, carry):
        state, tokens = carry
        state, output = step_program(model, sizes, shape, "random", params, state, packed[i])
        return state, tokens.at[i].set(output.sampled.tokens)

    return lax.fori_loop(0, len(packed), step, (state, jnp.zeros((len(packed), shape.S), jnp.int32)))


def admit_program(block_tables: jax.Array, sampling: SlotState, packed: jax.Array) -> tuple[jax.Array, SlotState]:
    """Writes the rows of newly admitted requests. packed: int32[A, PACKED_WIDTH + P], slot first."""
    scalars, tables = packed[:, : sampler.PACKED_WIDTH], packed[:, sampler.PACKED_WIDTH :]
    return block_tables.at[packed[:, 0]].set(tables), sampler.write_slots(sampling, scalars)


def score_program(model: nn.Module, max_logprobs: int, params, hidden: jax.Array, rows: jax.Array) -> SampleOutput:
    """hidden [largest T, E]; rows int32[2, R]: row of hidden, and the token that follows it."""
    logits = model.apply(params, hidden[rows[0]], method="logits")
    return sampler.prompt_logprobs(logits, rows[1], max_logprobs)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
