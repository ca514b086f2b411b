"""Times the experts' products of Qwen3-30B-A3B: python -m tests.kernels.gpu.bench_experts

Each line is one product of a step's tokens, 8 experts of 128 for each, beside the time that the matrices of the experts
touched need at a copy's bandwidth. Calls go through more experts than the L2 holds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gpu.grouped_matmul import GroupedConfig, grouped_matmul
from tests.kernels.gpu.bench_attention import COPY_BANDWIDTH, seconds

EXPERTS, CHOSEN, HIDDEN, INNER = 128, 8, 2048, 768
CALLS = 8


def routed(tokens, seed):
    """int32[EXPERTS]: rows of each, if a router sends each token to any of them alike."""
    chosen = np.argsort(np.random.default_rng(seed).random((tokens, EXPERTS)), axis=1)[:, :CHOSEN]
    return np.bincount(chosen.reshape(-1), minlength=EXPERTS).astype(np.int32)


def time_product(tokens, gated):
    """Seconds of one call, experts touched in it, and bytes of a matrix."""
    F, C = (2 * INNER, HIDDEN) if gated else (HIDDEN, INNER)
    weights = jax.random.normal(jax.random.key(0), (EXPERTS, F, C), jnp.bfloat16) / C**0.5
    rows = [jax.random.normal(jax.random.key(i), (tokens * CHOSEN, C), jnp.bfloat16) for i in range(CALLS)]
    sizes = [routed(tokens, seed) for seed in range(CALLS)]

    @jax.jit
    def step(weights, rows, sizes):
        return [grouped_matmul(x, weights, n, jax.nn.silu if gated else None) for x, n in zip(rows, sizes, strict=True)]

    taken = seconds(step, weights, rows, [jnp.asarray(n) for n in sizes], calls=CALLS)
    return taken, np.mean([(n > 0).sum() for n in sizes]), F * C * 2


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, jax.__version__)
    for tokens in (1, 8, 64, 256, 4096):
        for gated in (True, False):
            taken, touched, size = time_product(tokens, gated)
            floor = touched * size / COPY_BANDWIDTH
            inner, outer = (INNER, HIDDEN) if gated else (HIDDEN, INNER)
            config = GroupedConfig.of(tokens * CHOSEN, EXPERTS, inner, outer, gated)
            name = "gate and up" if gated else "down"
            time = (
                f"{taken * 1e6:8.1f} us, floor of {touched:5.1f} experts {floor * 1e6:7.1f} ({taken / floor:.2f} times)"
            )
            print(f"{tokens:5} tokens, {name:11}: {time}, {config}", flush=True)
