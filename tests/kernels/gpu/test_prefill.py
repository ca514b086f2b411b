"""Prefill and mixed steps on the GPU against the reference in float32, through the public function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionBatch, ragged_paged_attention
from tests.kernels.gpu import paged
from tests.kernels.gpu.test_decode import OPTIONS, SHAPES

pytestmark = pytest.mark.gpu

PROMPTS = [(200, 200), (700, 1), (64, 64), (131, 7), (1300, 400), (129, 129), (3000, 65)]  # tokens in all, new ones
DECODES = [(300, 1), (1, 1), (2000, 1)]


def case(seed, lens, num_decodes, H, K, D, N, dtype, T=None, sinks=False, **options):
    key = jax.random.key(seed)
    total = sum(new for _, new in lens)
    T = T or total + 70
    kv_lens = np.array([n for n, _ in lens] + [0, 0], np.int32)
    tables, (cache,) = paged.pool(key, kv_lens, K=K, D=D, N=N, dtype=dtype)
    cu = np.concatenate([[0], np.cumsum([new for _, new in lens] + [0, 0])]).astype(np.int32)
    num_seqs = jnp.asarray([num_decodes, len(lens)], jnp.int32)
    batch = AttentionBatch(jnp.asarray(kv_lens), tables, jnp.asarray(cu), num_seqs)
    q, k, v = (
        jax.random.normal(jax.random.fold_in(key, i), (T, heads, D), jnp.float32).astype(dtype)
        for i, heads in enumerate((H, K, K))
    )
    options = dict(options, scale=D**-0.5 * 1.5)
    if sinks:
        options["sinks"] = jax.random.normal(jax.random.fold_in(key, 9), (H,)) * 2
    return (q, k, v, cache, batch), options


def expected(q, k, v, cache, batch, **options):
    used = jnp.zeros(cache[0].shape[0], bool).at[batch.block_tables].set(True)[:, None, None, None]
    cache = tuple(jnp.where(used, x, 0).astype(jnp.float32) for x in cache)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        return ragged_paged_attention(q, k, v, cache, batch, backend="reference", **options)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mixed", [True, False])
def test_agrees_with_the_reference(shape, options, dtype, mixed):
    if dtype == jnp.float16 and shape not in SHAPES[:3]:
        pytest.skip("float16 differs in nothing that depends on these shapes")
    seed = int(np.random.default_rng().integers(1 << 30))
    lens = DECODES + PROMPTS if mixed else PROMPTS
    args, options = case(seed, lens, len(DECODES) * mixed, *shape, dtype, **options)
    jnp.full((1 << 28,), jnp.nan).block_until_ready()  # what is left unwritten is then NaN
    out, _ = ragged_paged_attention(*args, backend="mosaic_gpu", **options)
    assert paged.error(out, expected(*args, **options)) < 1e-2, seed
    assert not np.asarray(out[sum(new for _, new in lens) :]).any()


def test_result_of_a_sequence_does_not_depend_on_its_neighbours():
    (q, k, v, cache, batch), options = case(5, PROMPTS, 0, *SHAPES[0], jnp.bfloat16)
    together, _ = ragged_paged_attention(q, k, v, cache, batch, backend="mosaic_gpu", **options)
    for s, (_, new) in enumerate(PROMPTS):
        start = int(batch.cu_q_lens[s])
        one = dataclasses.replace(
            batch,
            kv_lens=batch.kv_lens[s : s + 1],
            block_tables=batch.block_tables[s : s + 1],
            cu_q_lens=jnp.asarray([0, new], jnp.int32),
            num_seqs=jnp.asarray([0, 1], jnp.int32),
        )
        rows = slice(start, start + new)
        alone, _ = ragged_paged_attention(q[rows], k[rows], v[rows], cache, one, backend="mosaic_gpu", **options)
        np.testing.assert_array_equal(np.asarray(alone, np.float32), np.asarray(together[rows], np.float32))
