"""Runs steps on the device: holds the weights and the device state, the compiled programs, and no policy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models import CACHE, head_params, sharded
from paged import sampler
from paged.compiler import Compiler, Lowering
from paged.packing import StepShape, at_least, pack
from paged.plan import StepPlan
from paged.programs import (
    DeviceState,
    StepRows,
    admit_program,
    chain_program,
    clear_program,
    forward_program,
    sample_program,
    score_program,
)
from paged.request import Request
from paged.runner_shape import RunnerShape
from paged.sampler import VARIANTS, SampleOutput, Variant
from paged.sampling_params import SamplingParams

# A product that has no kernel of ours is cuBLAS's, in the form that it takes for the fastest. XLA would compile many
# forms of each and choose by time, which takes long, needs the device, and ends not the same at every start.
ON_HOPPER = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
# What XLA puts into CUDA graphs by itself, and loops. Outside, the host waits in each turn to be told whether there is
# another, after all that was dispatched before, and dispatches nothing meanwhile.
LOOPS_IN_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
ADMIT_ROWS = 8  # requests whose slots one call writes
SCORE_ROWS = 64  # prompt positions whose logprobs one call computes
CLEARED_BLOCKS = 64  # by one call
WARM_UPS = 2  # a GPU loads a program when it first runs, and records its graphs then and once more


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
    """params: the shapes of a model's parameters, until it is started."""

    def __init__(self, model: nn.Module, params: Any, shape: RunnerShape):
        self.model, self.params, self.shape = model, params, shape
        self.state: Any = None  # a DeviceState, once compiled
        self._head = head_params(params)
        self._forwards: dict[StepShape, Any] = {}
        self._samplings: dict[tuple[int, Variant], Any] = {}
        self._chains: dict[StepShape, Any] = {}
        self._admit: Any = None
        self._admit_full: Any = None
        self._score: Any = None
        self._clear: Any = None
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
            unfinished=self._hidden(s.prompt_sizes[-1]),
            rows=StepRows(self._hidden(s.max_num_seqs), self._shape((3, s.max_num_seqs))),
            last_tokens=self._shape((slots,)),
            sampling=jax.tree.map(lambda x: self._shape(x.shape, x.dtype), sampling),
        )

    def _hidden(self, rows: int) -> Any:
        return self._shape((rows, self.model.config.hidden_size), self.model.compute.dtype)

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

    def compile(self, compiler: Compiler) -> None:
        """Compiles everything that serving will ever call."""
        s = self.shape
        names = self.lowerings()
        compiler.start(names, s)
        programs = compiler.get(names)
        self._forwards = {step: programs[self.forward_name(step)] for step in s.steps}
        self._samplings = {key: programs[sampling_name(*key)] for key in s.samplings}
        self._chains = {step: programs[self._in_pool(step, "chain")] for step in s.chained}
        self._admit, self._admit_full = programs[self._in_pool("admit")], programs["admit_full"]
        self._score, self._clear = programs["score"], programs[self._in_pool("clear")]

    def start(self, params: Any) -> None:
        """From now on it can execute."""
        self.params, self._head = params, head_params(params)
        self.reset_state()

    def warm_up(self) -> None:
        """Runs every program for nobody, on padding, so that what its first runs load and record is there for the first
        requests. Only the scratch slot and the padding block are written to."""
        nobody, s = StepPlan([], [], []), self.shape
        for _ in range(WARM_UPS):
            for step, variant in self._steps_and_variants():
                self._execute(self.pack(nobody, step)._replace(variant=variant))
            for step in self._chains:
                self._execute_chain([self.pack(nobody, step)] * s.chain)
            self._write_tables([])
            self._write_full_row(s.max_num_seqs, sampler.full_row(SamplingParams(), [], [], [], s.vocab_size))
            self._score(self.params, self.state.unfinished, self._send(np.zeros((2, SCORE_ROWS), np.int32)))
            self.clear_blocks([0])
        jax.block_until_ready(self.state)

    def _steps_and_variants(self) -> list[tuple[StepShape, Variant]]:
        """Each step and each sampling is in one of them."""
        after = {self.shape.sampled_rows(step): step for step in reversed(self.shape.steps)}
        cheapest = self.shape.variants[0]
        samplings = [(after[S], variant) for S, variant in self.shape.samplings if variant != cheapest]
        return [(step, cheapest) for step in self.shape.steps] + samplings

    def lowerings(self) -> dict[str, Lowering]:
        """Of every program, by name; those that take long to compile come first."""
        s = self.shape
        samplings = self.sampling_lowerings(s.samplings) | self.score_lowering()
        small = {
            self._in_pool("admit"): self._lower_admit,
            "admit_full": self._lower_admit_full,
            self._in_pool("clear"): self._lower_clear,
        }
        chains = {self._in_pool(step, "chain"): partial(self.lower_chain, step) for step in s.chained}
        return samplings | chains | self.forward_lowerings(s.steps[::-1]) | small

    def forward_lowerings(self, steps: Sequence[StepShape]) -> dict[str, Lowering]:
        return {self.forward_name(step): partial(self.lower_forward, step) for step in steps}

    def sampling_lowerings(self, samplings: Sequence[tuple[int, Variant]]) -> dict[str, Lowering]:
        """Of a step's tokens: they do not depend on the pool's size."""
        return {sampling_name(*key): partial(self.lower_sampling, *key) for key in samplings}

    def score_lowering(self) -> dict[str, Lowering]:
        """Of prompt logprobs: it does not either."""
        return {"score": self._lower_score}

    def forward_name(self, step: StepShape) -> str:
        return self._in_pool(step)

    def _in_pool(self, *words: object) -> str:
        """The name of a program that depends on the pool's size."""
        return "-".join(map(str, (*words, f"{self.shape.num_blocks}x{self.shape.blocks_per_seq}")))

    def lower_forward(self, step: StepShape) -> jax.stages.Lowered:
        state, everywhere = self.state_shapes(), self._everywhere
        placed = _places(state.caches), everywhere, everywhere, everywhere
        program = partial(forward_program, self.model, self.shape, step)
        lower = self._jit(program, donate_argnums=(1, 2, 3, 4), out_shardings=placed).lower
        return lower(_shapes(self.params), *state[:5], self._shape((step.packed_size,)))

    def lower_sampling(self, S: int, variant: Variant) -> jax.stages.Lowered:
        program = partial(sample_program, self.model, self.shape, variant, S)
        options = LOOPS_IN_GRAPHS if variant in ("filtered", "full") else {}
        jitted = self._jit(program, options, donate_argnums=(2, 3), out_shardings=self._everywhere)
        return jitted.lower(_shapes(self._head), *self.state_shapes()[3:])

    def lower_chain(self, step: StepShape) -> jax.stages.Lowered:
        state, packed = self.state_shapes(), self._shape((self.shape.chain, step.packed_size))
        program = partial(chain_program, self.model, self.shape, step)
        lower = self._jit(program, donate_argnums=1, out_shardings=(_places(state), self._everywhere)).lower
        return lower(_shapes(self.params), state, packed)

    def _lower_admit(self) -> jax.stages.Lowered:
        state = self.state_shapes()
        packed = self._shape((ADMIT_ROWS, sampler.PACKED_WIDTH + self.shape.blocks_per_seq))
        program = self._jit(admit_program, donate_argnums=(0, 1), out_shardings=self._everywhere)
        return program.lower(state.block_tables, state.sampling, packed)

    def _lower_admit_full(self) -> jax.stages.Lowered:
        shapes = sampler.full_row_shapes(self.shape.vocab_size)
        row = jax.tree.map(lambda x: self._shape(x.shape, x.dtype), shapes)
        program = self._jit(sampler.write_full_slot, donate_argnums=0, out_shardings=self._everywhere)
        return program.lower(self.state_shapes().sampling, self._shape(()), row)

    def _lower_clear(self) -> jax.stages.Lowered:
        caches = self.state_shapes().caches
        program = self._jit(clear_program, donate_argnums=0, out_shardings=_places(caches))
        return program.lower(caches, self._shape((CLEARED_BLOCKS,)))

    def _lower_score(self) -> jax.stages.Lowered:
        score = partial(score_program, self.model, self.shape.max_logprobs)
        program = self._jit(score, out_shardings=self._everywhere)
        return program.lower(_shapes(self.params), self.state_shapes().unfinished, self._shape((2, SCORE_ROWS)))

    def _jit(self, program: Callable, options: Mapping[str, Any] | None = None, **how: Any) -> Any:
        """jax.jit as `how` says; `options` are for the compiler where kernels are Mosaic GPU's."""
        compute = self.model.compute
        if compute.attention_backend != "mosaic_gpu":
            return jax.jit(program, **how)
        ours = ON_HOPPER if compute.shards == 1 else {}  # over several devices every product is XLA's
        return jax.jit(program, compiler_options=ours | dict(options or {}), **how)

    @property
    def compiled(self) -> tuple[list[Any], list[Any]]:
        """Programs with the layers in them, and those that read what they leave."""
        return [*self._forwards.values(), *self._chains.values()], [*self._samplings.values(), self._score]

    # ---- serving --------------------------------------------------------------------------------------------

    def pack(self, plan: StepPlan, shape: StepShape | None = None) -> PackedStep:
        """For execution after those packed before it; in `shape`, or the smallest that fits. Its sampler is the
        cheapest that serves every request of the step."""
        shape = shape or self._bucket(plan)
        packed = pack(plan, shape, scratch_slot=self.shape.max_num_seqs)
        for request in plan.admitted:
            self._ranks[request.slot] = VARIANTS.index(sampler.variant_of(request.sampling_params))
        rank = self._ranks[shape.split(packed).slots].max()
        variant = next(v for v in self.shape.variants if VARIANTS.index(v) >= rank)
        return PackedStep(plan, shape, variant, packed)

    def chain_length(self, step: PackedStep) -> int:
        """How many steps like this one call runs, if there are as many; else 1."""
        return self.shape.chain if step.shape in self._chains and step.variant in ("greedy", "random") else 1

    def execute(self, steps: Sequence[PackedStep]) -> list[StepHandle]:
        """Dispatches steps and the copies of their outputs; returns without waiting for either."""
        if len(steps) > 1 and len(steps) == self.chain_length(steps[0]):
            return [self._execute_chain(steps)]
        return [self._execute(step) for step in steps]

    def _execute(self, step: PackedStep) -> StepHandle:
        self._write_slots(step.plan.admitted)
        forward, sampling = (
            self._forwards[step.shape],
            self._samplings[self.shape.sampled_rows(step.shape), step.variant],
        )
        written = forward(self.params, *self.state[:5], self._send(step.packed))
        chosen, sampled = sampling(self._head, *written[3:], *self.state[4:])
        self.state = DeviceState(*written, *chosen)
        scores = list(self._score_prompts(step.plan))
        for array in jax.tree.leaves((sampled, [arrays for _, _, arrays in scores])):
            array.copy_to_host_async()
        return StepHandle([step.plan], sampled, scores)

    def _execute_chain(self, steps: Sequence[PackedStep]) -> StepHandle:
        packed = self._send(np.stack([step.packed for step in steps]))
        self.state, tokens = self._chains[steps[0].shape](self.params, self.state, packed)
        tokens.copy_to_host_async()
        return StepHandle([step.plan for step in steps], SampleOutput(tokens), [])

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zeros in blocks that nobody holds."""
        for first in range(0, len(blocks), CLEARED_BLOCKS):
            ids = np.zeros(CLEARED_BLOCKS, np.int32)  # the padding block may be cleared too
            ids[: len(blocks) - first] = blocks[first : first + CLEARED_BLOCKS]
            self.state = self.state._replace(caches=self._clear(self.state.caches, self._send(ids)))

    def _bucket(self, plan: StepPlan) -> StepShape:
        if not plan.prefills:
            S = at_least(self.shape.decode_sizes, len(plan.decodes))
            return StepShape(S, S, decode_only=True)
        T = at_least(self.shape.prompt_sizes, plan.num_tokens)
        return StepShape(T, self.shape.max_num_seqs, decode_only=False)

    def _write_slots(self, admitted: list[Request]) -> None:
        s = self.shape
        for first in range(0, len(admitted), ADMIT_ROWS):
            self._write_tables(admitted[first : first + ADMIT_ROWS])
        for request in admitted:
            if sampler.needs_full_row(request.sampling_params):
                arrays = sampler.full_row(
                    request.sampling_params,
                    request.prompt_token_ids,
                    request.output_token_ids,
                    request.stop_token_ids,
                    s.vocab_size,
                )
                self._write_full_row(request.slot, arrays)

    def _write_tables(self, requests: Sequence[Request]) -> None:
        """Block tables and scalars of up to ADMIT_ROWS requests."""
        s = self.shape
        packed = np.zeros((ADMIT_ROWS, sampler.PACKED_WIDTH + s.blocks_per_seq), np.int32)
        packed[:, 0] = s.max_num_seqs
        for row, request in zip(packed, requests, strict=False):
            row[: sampler.PACKED_WIDTH] = sampler.pack_scalars(
                request.slot, request.sampling_params, request.seed, request.num_prompt_tokens
            )
            row[sampler.PACKED_WIDTH :][: len(request.block_table)] = request.block_table
        tables, sampling = self._admit(self.state.block_tables, self.state.sampling, self._send(packed))
        self.state = self.state._replace(block_tables=tables, sampling=sampling)

    def _write_full_row(self, slot: int, arrays: Any) -> None:
        sampling = self._admit_full(self.state.sampling, self._send(np.int32(slot)), self._send(arrays))
        self.state = self.state._replace(sampling=sampling)

    def _score_prompts(self, plan: StepPlan) -> Iterator[tuple[Request, range, SampleOutput]]:
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
                    scored = self._score(self.params, self.state.unfinished, self._send(rows))
                    yield request, range(start, start + count), scored
            row += chunk.num_tokens


def variant_ranks(shape: RunnerShape) -> np.ndarray:
    """int[slots]: by slot, which of VARIANTS is the cheapest that serves the request in it."""
    return np.zeros(shape.max_num_seqs + 1, int)


def sampling_name(S: int, variant: Variant) -> str:
    return f"sample-{S}-{variant}"


def _places(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
