"""Times the program that takes a step's tokens, as an engine compiles it:

python -m tests.paged.bench_sampler [--model configs/qwen3-0.6b] [--rows 256]

For each variant, and what requests may ask of it: the whole program, the sampler alone on logits that are there,
and how long the calls keep the host.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import build_model, head_params, make_mesh, param_shapes
from paged import sampler, startup
from paged.config import EngineConfig
from paged.programs import StepRows
from paged.runner import Runner
from paged.sampler import SlotState
from paged.sampling_params import SamplingParams

LIKELY = 40  # tokens that have nearly all of a row's probability, unless the row is flat
FILTERS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
PENALTIES = {"presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
CASES: dict[str, tuple[sampler.Variant, dict[str, Any]]] = {
    "greedy": ("greedy", {"temperature": 0}),
    "temperature": ("random", {"temperature": 0.8}),
    "temperature in full": ("full", {"temperature": 0.8}),
    "top-k": ("filtered", {"temperature": 0.8, "top_k": 50}),
    "top-p": ("filtered", {"temperature": 0.8, "top_p": 0.9}),
    "top-k, top-p, min-p": ("filtered", FILTERS),
    "penalties": ("full", {"temperature": 0.8, **PENALTIES}),
    "all": ("full", FILTERS | PENALTIES),
    "all, and a bias": ("full", FILTERS | PENALTIES | {"logit_bias": {5: 1.0, 70: -1.0}}),
    "greedy, logprobs": ("full", {"temperature": 0, "logprobs": 5}),
    "top-p, flat rows": ("filtered", {"temperature": 0.8, "top_p": 0.9}),
}


def engine_runner(folder: str, rows: int) -> Runner:
    """An engine's, with a small pool."""
    config = EngineConfig.from_kwargs(
        model=folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=rows, max_model_len=4096
    )
    checkpoint, dtype = startup.open_model(config.model), startup.compute_dtype("auto")
    model = build_model(checkpoint.config, dtype=dtype, attention_backend="mosaic_gpu", mesh=make_mesh(1))
    shape = startup.runner_shape(config, checkpoint, dtype, "gpu")
    return Runner(model, param_shapes(model), replace(shape, num_blocks=2))


def random_head(runner: Runner) -> Any:
    """The head's parameters, rows of length 1."""

    def make(leaf, key):
        return (jax.random.normal(key, leaf.shape) * leaf.shape[-1] ** -0.5).astype(leaf.dtype)

    leaves, tree = jax.tree.flatten(head_params(runner.params))
    return jax.tree.unflatten(tree, map(jax.jit(make, static_argnums=0), leaves, jax.random.split(jax.random.key(0))))


def hidden_rows(head: Any, rows: int, flat: bool) -> jax.Array:
    """Whose logits are normal, with some likely tokens above them."""
    kernel = jax.tree.leaves(head)[0]
    x = jax.random.normal(jax.random.key(1), (rows, kernel.shape[1]))
    likely = jax.random.randint(jax.random.key(2), (rows, LIKELY), 0, len(kernel))
    x += 0 if flat else jnp.einsum("rlc,l->rc", kernel[likely], 18 - 0.25 * jnp.arange(LIKELY))
    return x.astype(kernel.dtype)


def slots_of(params: SamplingParams, rows: int, vocab_size: int) -> SlotState:
    """Of as many requests, and a scratch slot. Where they have penalties, one token in a hundred has been there."""
    shapes = sampler.slot_state_shapes(rows + 1, vocab_size)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    packed = np.stack([sampler.pack_scalars(i, params, seed=i, prompt_len=10) for i in range(rows)])
    state = jax.jit(sampler.write_slots)(state, packed)
    row = sampler.full_row(params, [1], [], [2], vocab_size)
    seen = jax.random.bernoulli(jax.random.key(3), 0.01, state.counts.shape)
    large = {name: jnp.broadcast_to(value, getattr(state, name).shape) for name, value in row._asdict().items()}
    return replace(state, **(large | {"counts": 2 * seen.astype(jnp.int32)}))


def seconds(call: Callable[[], Any], calls: int = 20, repeats: int = 5) -> tuple[float, float]:
    """Of one of many calls: until it is done, and until it is dispatched."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        dispatched = time.perf_counter() - begin
        jax.block_until_ready(out)
        times.append(((time.perf_counter() - begin) / calls, dispatched / calls))
    return sorted(times)[repeats // 2]


class Bench:
    """The programs of a model's head, and what they are called with."""

    def __init__(self, folder: str, rows: int):
        self.rows, self.runner = rows, engine_runner(folder, rows)
        self.head = random_head(self.runner)
        self.programs = {v: self.runner.lower_sampling(rows, v).compile() for v in sampler.VARIANTS}
        self.samplers = {
            v: jax.jit(partial(sampler.sample, variant=v, max_logprobs=self.runner.shape.max_logprobs))
            for v in sampler.VARIANTS
        }
        self.logits = jax.jit(partial(self.runner.model.apply, method="logits"))

    def time(self, case: str) -> dict[str, float]:
        """Microseconds."""
        variant, options = CASES[case]
        state = slots_of(SamplingParams(**options), self.rows, self.runner.shape.vocab_size)
        hidden = hidden_rows(self.head, self.rows, flat="flat" in case)
        slots, positions = jnp.arange(self.rows), jnp.full(self.rows, 100)
        logits = self.logits(self.head, hidden)
        alone, _ = seconds(lambda: self.samplers[variant](logits, state, slots, positions))
        packed = jnp.stack([slots, positions, jnp.ones(self.rows, jnp.int32)])
        written = [jnp.zeros(self.rows + 1, jnp.int32), state]

        def call():
            written[:], output = self.programs[variant](self.head, StepRows(hidden, packed), *written)
            return output

        whole, dispatch = seconds(call)
        return {"whole": whole * 1e6, "sampler": alone * 1e6, "dispatch": dispatch * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="configs/qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()
    bench = Bench(args.model, args.rows)
    print(jax.devices()[0].device_kind, jax.__version__, f"{args.model}, {args.rows} rows; microseconds of a call")
    for case in CASES:
        times = bench.time(case)
        print(f"{case:24}", ", ".join(f"{name} {value:7.1f}" for name, value in times.items()), flush=True)


if __name__ == "__main__":
    main()
