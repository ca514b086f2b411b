"""Prefill and mixed steps on the GPU against the reference in float32, through the public function."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionBatch, ragged_paged_attention
from kernels_pallas.gpu.prefill import prefill_attention
from tests.kernels.gpu import paged
from tests.kernels.gpu.test_decode import EIGHT_BITS, OPTIONS, SHAPES

pytestmark = pytest.mark.gpu

PROMPTS = [(200, 200), (700, 1), (64, 64), (131, 7), (1300, 400), (129, 129), (3000, 65)]  # tokens in all, new ones
DECODES = [(300, 1), (1, 1), (2000, 1)]


def case(seed, lens, num_decodes, H, K, D, N, dtype, cache_dtype=None, T=None, sinks=False, **options):
    key = jax.random.key(seed)
    total = sum(new for _, new in lens)
    T = T or total + 70
    kv_lens = np.array([n for n, _ in lens] + [0, 0], np.int32)
    tables, (cache,) = paged.pool(key, kv_lens, K=K, D=D, N=N, dtype=cache_dtype or dtype)
    cu = np.concatenate([[0], np.cumsum([new for _, new in lens] + [0, 0])]).astype(np.int32)
    num_seqs = jnp.asarray([num_decodes, len(lens)], jnp.int32)
    batch = AttentionBatch(jnp.asarray(kv_lens), tables, jnp.asarray(cu), num_seqs)
    q, k, v = (
        jax.random.normal(jax.random.fold_in(key, i), (T, heads, D), jnp.float32).astype(dtype)
        for i, heads in enumerate((H, K, K))
    )
    options = dict(
        options, scale=D**-0.5 * float(jax.random.uniform(jax.random.fold_in(key, 8), (), minval=0.5, maxval=2))
    )
    if sinks:
        options["sinks"] = jax.random.normal(jax.random.fold_in(key, 9), (H,)) * 2
    return (q, k, v, cache, batch), options


@paged.oracle
def expected(q, k, v, cache, batch, **options):
    cache = paged.in_float32(cache, batch.block_tables)
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
    agrees_with_the_reference(shape, options, dtype, None, mixed)


@pytest.mark.parametrize(("shape", "options", "dtype", "cache_dtype"), EIGHT_BITS, ids=str)
def test_over_eight_bits_agrees_with_the_reference(shape, options, dtype, cache_dtype):
    agrees_with_the_reference(shape, options, dtype, cache_dtype, mixed=True)


def agrees_with_the_reference(shape, options, dtype, cache_dtype, mixed):
    seed = int(np.random.default_rng().integers(1 << 30))
    lens = DECODES + PROMPTS if mixed else PROMPTS
    args, options = case(seed, lens, len(DECODES) * mixed, *shape, dtype, cache_dtype, **options)
    jnp.full((1 << 28,), jnp.nan).block_until_ready()  # what is left unwritten is then NaN
    out, _ = ragged_paged_attention(*args, backend="mosaic_gpu", **options)
    assert paged.error(out, expected(*args, **options)) < 1e-2, seed
    assert not np.asarray(out[sum(new for _, new in lens) :]).any()


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("D", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (128, "float16"), (256, "bfloat16")])
def test_numbers_of_eight_bits_are_read_exactly(D, dtype, cache_dtype):
    """Each of 64 tokens attends to itself alone, so that its result is its value; these are all numbers there are."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(cache_dtype))
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    values = jnp.asarray(np.resize(numbers, (1, 1, 64, D)))
    ones = jnp.ones((1, 1, 64), jnp.float32)
    q = jnp.eye(64, D, dtype=dtype)[:, None]
    lens = [jnp.asarray(x) for x in ([64], [[0]], [0, 64], [0, 1])]
    out = prefill_attention(q, (q[None, None, :, 0].astype(cache_dtype), values, ones, ones), *lens, scale=100.0)
    np.testing.assert_array_equal(np.asarray(out[:, 0], np.float32), values[0, 0].astype(jnp.float32))


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


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize(
    ("shape", "cache_dtype"), [(SHAPES[0], None), (SHAPES[2], None), (SHAPES[4], None), (SHAPES[0], "int8")], ids=str
)
def test_result_of_a_token_does_not_depend_on_how_its_prompt_is_cut(shape, cache_dtype, options):
    """To the last bit, from one chunk to chunks of a few tokens, with another sequence before it or none."""
    length, neighbour = 1000, 5
    rng = np.random.default_rng()
    seed = int(rng.integers(1 << 30))
    lens = [(length, length), (neighbour, neighbour)]
    (q, _, _, cache, batch), options = case(seed, lens, 0, *shape, jnp.bfloat16, cache_dtype, T=length + 8, **options)
    prompt, other = batch.block_tables[0], batch.block_tables[1]

    def attend(start, stop, first):
        """The rows of tokens `start` to `stop` - 1, which come `first` rows behind the batch's beginning."""
        rows = jnp.zeros_like(q).at[first : first + stop - start].set(q[start:stop])
        kv_lens, tables = jnp.asarray([neighbour, stop]), jnp.stack([other, prompt])
        cu_q_lens = jnp.asarray([0, first, first + stop - start])
        num_seqs = jnp.asarray([0 if first else 1, 2])
        out = prefill_attention(rows, cache, kv_lens, tables, cu_q_lens, num_seqs, **options)
        return np.asarray(out[first : first + stop - start], np.float32)

    whole = attend(0, length, 0)
    for cuts in ([64, 512], [1, 130, 333, 998], np.sort(rng.choice(np.arange(1, length), 3, replace=False))):
        edges = [0, *map(int, cuts), length]
        for start, stop in pairwise(edges):
            for first in (0, neighbour):
                part = attend(start, stop, first)
                np.testing.assert_array_equal(part, whole[start:stop], f"seed {seed}, {start} to {stop} at row {first}")
