"""Times the linear layers of a model, of few rows, through XLA and through the kernel.

python -m tests.kernels.gpu.bench_linear [rows ...]

A product's share of all kernels in the profiler's trace: with the gate's activation, and with adding and the norm for
what goes to the residual. No weights are still in the L2.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import add_rms_norm, gated_linear, linear_parts
from tests.kernels.gpu.bench_attention import COPY_BANDWIDTH, L2

MODELS = {  # each layer's features and columns
    "Qwen3-0.6B": {"qkv": (4096, 1024), "out": (1024, 2048), "gate, up": (3072, 1024), "down": (1024, 3072)},
    "Llama-3.1-8B": {"qkv": (6144, 4096), "out": (4096, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
}
REPEATS = 5


def run_layer(x, weights, total, scale, name, backend):
    """The products with all of the weights, and the last residual."""
    products = []
    for kernel in weights:
        if name == "gate, up":
            parts = gated_linear(x, kernel, "silu", backend=backend)[None]
        else:
            parts = linear_parts(x, kernel, out_dtype=x.dtype, backend=backend)
        if name in ("out", "down"):
            total, _ = add_rms_norm(total, parts, scale, 1e-6, backend="mosaic_gpu")
        products.append(parts)
    return products, total


def busy(run) -> float:
    """Microseconds that the GPU's kernels take of one of REPEATS calls."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(REPEATS):
                out = run()
            jax.block_until_ready(out)
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name]
        return sum(event.duration_ns for line in lines for event in line.events) / 1e3 / REPEATS


def time_layer(M, F, C, name, backend):
    """Microseconds of one product, and how far the first is from float32's."""
    rows = F * 2 if name == "gate, up" else F
    count = max(4, int(2 * L2 / (rows * C * 2)))
    draw = jax.jit(lambda key: (jax.random.normal(key, (rows, C)) / C**0.5).astype(jnp.bfloat16))
    weights = [draw(key) for key in jax.random.split(jax.random.key(0), count)]
    x = jax.random.normal(jax.random.key(1), (M, C), jnp.bfloat16)
    residual = jnp.zeros((M, F), x.dtype), jnp.ones(F, x.dtype)
    run = partial(jax.jit(run_layer, static_argnums=(4, 5)), x, weights, *residual, name, backend)
    y = np.asarray(run()[0][0].astype(jnp.float32)).sum(axis=0)
    with jax.default_matmul_precision("highest"):
        expected = x.astype(jnp.float32) @ weights[0].astype(jnp.float32).T
    if name == "gate, up":
        expected = jax.nn.silu(expected[:, :F]) * expected[:, F:]
    return busy(run) / count, np.linalg.norm(y - expected) / np.linalg.norm(expected)


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, jax.__version__)
    for model, layers in MODELS.items():
        for M in map(int, sys.argv[1:] or (8, 64, 128, 256)):
            for name, (F, C) in layers.items():
                xla, _ = time_layer(M, F, C, name, "reference")
                kernel, wrong = time_layer(M, F, C, name, "mosaic_gpu")
                floor = F * (2 if name == "gate, up" else 1) * C * 2 / COPY_BANDWIDTH * 1e6
                times = f"XLA {xla:6.1f} us, kernel {kernel:6.1f} us, floor {floor:5.1f} us"
                print(f"{model:12} {M:4} rows, {name:8}: {times}, error {wrong:.4f}", flush=True)
