"""Random paged batches for the kernels' tests and timings: shuffled pools, poison wherever nothing may be read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import is_quantized, quantize, reference


def pool(key, kv_lens, *, K, D, N, dtype, P=None, layers=1):
    """Block tables int32[S, P] over a shuffled pool, and `layers` caches of it.

    Blocks of no sequence are NaN; block 0 and the places behind a sequence's end are finite and large. Of eight-bit
    caches, this holds of the scales.
    """
    kv_lens = np.asarray(kv_lens)
    used = -(-kv_lens // N)
    P = P or int(max(used.max(), 1)) + 1
    B = int(used.sum()) + 9
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 1 << 30)))
    free = iter(rng.permutation(np.arange(1, B)))
    tables = np.zeros((len(kv_lens), P), np.int32)
    owned = np.zeros(B, bool)
    owned[0] = True
    filled = np.zeros((B, N), bool)
    for s, n in enumerate(kv_lens):
        for b in range(used[s]):
            tables[s, b] = next(free)
            filled[tables[s, b], : n - b * N] = True
    owned[tables[tables > 0]] = True
    poison = jnp.asarray(np.where(filled, 1.0, np.where(owned[:, None], 50.0, np.nan)), jnp.float32)[:, None, :, None]

    @jax.jit
    def make(key):
        xs = [jax.random.normal(k, (B, K, N, D), jnp.float32) for k in jax.random.split(key)]
        if not is_quantized(dtype):
            return tuple((x * poison).astype(dtype) for x in xs)
        values, scales = zip(*(quantize(x, dtype) for x in xs), strict=True)
        return *values, *(scale * poison[..., 0] for scale in scales)

    return jnp.asarray(tables), [make(k) for k in jax.random.split(key, layers)]


def in_float32(cache, tables):
    """What the reference reads as the cache in float32, without the poison of blocks that are in no table."""
    used = jnp.zeros(cache[0].shape[0], bool).at[tables].set(True)
    if is_quantized(cache[0].dtype):
        values, scales = cache[:2], cache[2:]
        return *values, *(jnp.where(used[:, None, None], scale, 0) for scale in scales)
    return tuple(jnp.where(used[:, None, None, None], x, 0).astype(jnp.float32) for x in cache)


oracle = partial(  # a decorator; trying which product is the fastest would take most of a test's time
    jax.jit, static_argnames=("scale", "window", "soft_cap"), compiler_options={"xla_gpu_autotune_level": 0}
)


@oracle
def expected_decode(q, cache, kv_lens, tables, *, scale, window=None, soft_cap=None, sinks=None):
    """The reference in float32, with true float32 products."""
    options = reference.Options(scale, window, soft_cap, sinks)
    with jax.default_matmul_precision("highest"):
        return reference.attend_decodes(q.astype(jnp.float32), in_float32(cache, tables), kv_lens, tables, options)


def error(out, expected):
    """The largest relative error of any row [.., D] of one head; NaN stays NaN."""
    out, expected = (np.asarray(x, np.float64) for x in (out, expected))
    size = np.maximum(np.linalg.norm(expected, axis=-1), 1e-3)
    return float((np.linalg.norm(out - expected, axis=-1) / size).max())
