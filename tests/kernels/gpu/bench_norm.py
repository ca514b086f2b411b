"""Times layers of two products with adding and a norm between them, through XLA and through the kernel.

python -m tests.kernels.gpu.bench_norm [rows ...]
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import add_rms_norm, linear, linear_parts
from tests.kernels.gpu.bench_attention import seconds

SHAPES = [(1024, 3072, 28), (4096, 4096, 16)]  # width, inner width, layers
THROUGH_KERNELS = {"backend": "mosaic_gpu"}


def run_layers(x, weights, norm_backend):
    parts = x[None]
    for up, down, scale in weights:
        x, y = add_rms_norm(x, parts, scale, 1e-6, backend=norm_backend)
        y = linear(y, up, out_dtype=x.dtype, **THROUGH_KERNELS)
        parts = linear_parts(y, down, out_dtype=x.dtype, **THROUGH_KERNELS)
    return x, parts


def time_layer(M, E, F, layers, norm_backend):
    """Seconds of one layer."""

    def random(key, *shape):
        return (jax.random.normal(key, shape) / shape[-1] ** 0.5).astype(jnp.bfloat16)

    weights = []
    for key in jax.random.split(jax.random.key(0), layers):
        a, b, c = jax.random.split(key, 3)
        weights.append((random(a, F, E), random(b, E, F), random(c, E)))
    x = random(jax.random.key(1), M, E)
    return seconds(jax.jit(partial(run_layers, norm_backend=norm_backend)), x, weights, calls=layers)


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, jax.__version__)
    for E, F, layers in SHAPES:
        for M in map(int, sys.argv[1:] or (1, 8, 64, 128, 256, 2048)):
            times = [time_layer(M, E, F, layers, name) * 1e6 for name in ("reference", "mosaic_gpu")]
            print(f"{E} wide, {M:4} rows: XLA {times[0]:6.1f} us, kernel {times[1]:6.1f} us", flush=True)
