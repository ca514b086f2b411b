"""Times taking tokens in the output head beside the head and the draw through XLA.

python -m tests.kernels.gpu.bench_head [rows ...]
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import best_tokens, linear
from paged import draw
from tests.kernels.gpu.bench_attention import COPY_BANDWIDTH, seconds

MODELS = {"Qwen3-0.6B": (151936, 1024), "Llama-3.1-8B": (128256, 4096)}
CALLS = 8


def through_xla(x, kernel, keys=None, temperature=None):
    logits = linear(x, kernel, out_dtype=jnp.float32, backend="reference")
    if keys is None:
        return draw.best(logits)
    rows = {"temperature": temperature, "seed_lo": keys[:, 0], "seed_hi": keys[:, 1], "position": jnp.arange(len(x))}
    return draw.draw(logits, rows)


def through_kernel(*arguments):
    return best_tokens(*arguments, backend="mosaic_gpu")


def time_head(function, M, V, C, greedy):
    """Seconds of one call."""
    kernel = (jax.random.normal(jax.random.key(0), (V, C)) / C**0.5).astype(jnp.bfloat16)
    hidden = [jax.random.normal(jax.random.key(i), (M, C), jnp.bfloat16) for i in range(CALLS)]
    keys = np.random.default_rng(0).integers(0, 1 << 32, (M, 2), np.uint64).astype(np.uint32)
    drawn = () if greedy else (jnp.asarray(keys), jnp.full(M, 0.6, jnp.float32))

    @jax.jit
    def step(kernel, hidden, drawn):
        return [function(x, kernel, *drawn) for x in hidden]

    return seconds(step, kernel, hidden, drawn, calls=CALLS)


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, jax.__version__)
    for model, (V, C) in MODELS.items():
        print(f"{model}: the weights at a copy's bandwidth {V * C * 2 / COPY_BANDWIDTH * 1e6:.0f} us")
        for M in map(int, sys.argv[1:] or (1, 8, 64, 128, 256)):
            for greedy in (True, False):
                times = [time_head(function, M, V, C, greedy) * 1e6 for function in (through_xla, through_kernel)]
                name = "greedy" if greedy else "random"
                print(f"{M:4} rows, {name}: XLA {times[0]:6.1f} us, kernel {times[1]:6.1f} us", flush=True)
