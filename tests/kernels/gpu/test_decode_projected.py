"""Decode attention from the projection on the GPU, against its parts in plain jnp and the reference in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import QKNorm, sum_parts
from kernels_pallas.attention import rotated_qkv
from kernels_pallas.gpu.decode import decode_projected
from tests.kernels.gpu import paged

pytestmark = pytest.mark.gpu

SHAPES = [  # H, K, D, N, parts of the projection
    (32, 8, 128, 64, 1),
    (16, 8, 128, 16, 4),
    (9, 3, 64, 16, 2),
    (8, 8, 64, 64, 1),
    (4, 1, 256, 32, 1),
    (16, 1, 128, 128, 3),
    (14, 2, 128, 8, 1),
]
OPTIONS = [{}, {"window": 100}, {"window": 1}, {"soft_cap": 20.0, "window": 1024, "sinks": True}]
LENS = [1, 2, 17, 64, 65, 255, 256, 257, 0, 700, 1025, 3000, 12345]


def case(H, K, D, N, num_parts, *, normed, lens=LENS, dtype="bfloat16", sinks=False, **options):
    """The kernel with its options; its arguments; and those of what is expected."""
    seed = int(np.random.default_rng().integers(1 << 30))
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    tables, (cache,) = paged.pool(key, lens, K=K, D=D, N=N, dtype=dtype)
    parts = rng.normal(size=(num_parts, len(lens), H + 2 * K, D)) * num_parts**-0.5
    parts = jnp.asarray(parts, "float32" if num_parts > 1 else dtype)
    angles = jnp.asarray(rng.normal(size=(len(lens), D // 2)) * 30, jnp.float32)
    rotary = jnp.cos(angles), jnp.sin(angles)
    weights = tuple(jnp.asarray(rng.normal(size=D), dtype) for _ in range(2)) if normed else None
    newest = np.maximum(np.asarray(lens) - 1, 0)
    block, offset = np.asarray(tables)[np.arange(len(lens)), newest // N], newest % N
    cache = tuple(x.at[block, :, offset].set(77) for x in cache)  # what was there before is of nobody
    options |= {"scale": D**-0.5 * 1.5}
    if sinks:
        options["sinks"] = jnp.asarray(rng.normal(size=H) * 2, jnp.float32)
    attend = jax.jit(partial(decode_projected, num_heads=H, epsilon=1e-6, norm_offset=1.0, **options))
    return attend, (parts, rotary, weights, cache, jnp.asarray(lens, jnp.int32), tables), (block, offset), options


def expected(arguments, place, options):
    """Attention of what the parts in plain jnp make, [S, H, D], and the cache."""
    parts, rotary, weights, cache, kv_lens, tables = arguments
    norms = None if weights is None else QKNorm(*weights, 1e-6, 1.0)
    H = parts.shape[2] - 2 * cache[0].shape[1]
    rotary = tuple(table[:, None] for table in rotary)
    q, *new = jax.jit(lambda: rotated_qkv(sum_parts(parts, cache[0].dtype), rotary, norms, H))()
    real = np.asarray(kv_lens) > 0
    block, offset = (x[real] for x in place)
    cache = tuple(x.at[block, :, offset].set(y[real]) for x, y in zip(cache, new, strict=True))
    return paged.expected_decode(q, cache, kv_lens, tables, **options), cache


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_agrees_with_its_parts(shape, normed, options):
    check(*case(*shape, normed=normed, **options))


def test_float16():
    check(*case(*SHAPES[0], normed=True, dtype="float16"))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_large_batches_are_merged_as_they_go(options):
    """Small ones are not, see decode.py."""
    check(*case(24, 12, 64, 16, 2, normed=True, lens=LENS * 6, **options))


@pytest.mark.parametrize("lens", [[900 + 7 * i for i in range(32)], (LENS * 3)[:32]], ids=["alike", "different"])
def test_batches_of_about_as_many_heads_as_workers(lens):
    check(*case(*SHAPES[0][:4], 2, normed=True, lens=lens))


def check(attend, arguments, place, options):
    out, cache = expected(arguments, place, options)
    jnp.full((1 << 28,), jnp.nan).block_until_ready()  # what is left unwritten is then NaN
    ours, our_cache = attend(*arguments)
    assert paged.error(ours, out) < 1e-2
    assert not np.asarray(ours)[np.asarray(arguments[4]) == 0].any()
    for i, (x, y) in enumerate(zip(our_cache, cache, strict=True)):
        x, y = (np.array(z, np.float32) for z in (x, y))
        block, offset = place
        if i == 0:  # keys, which sums and roundings of their own have made
            assert paged.error(x[block, :, offset], y[block, :, offset]) < 1e-2
            x[block, :, offset] = y[block, :, offset]
        np.testing.assert_array_equal(x, y)


def test_result_of_a_sequence_does_not_depend_on_its_neighbours():
    """In a batch whose splits are merged on the way, and alone, where they are not."""
    attend, (parts, rotary, weights, cache, kv_lens, tables), place, _ = case(*SHAPES[0], normed=True, lens=LENS * 9)
    together, written = attend(parts, rotary, weights, cache, kv_lens, tables)
    for s in range(len(LENS)):
        row = slice(s, s + 1)
        of_row = parts[:, row], tuple(table[row] for table in rotary), weights, cache, kv_lens[row], tables[row]
        alone, written_alone = attend(*of_row)
        np.testing.assert_array_equal(np.asarray(alone[0], np.float32), np.asarray(together[s], np.float32))
        for x, y in zip(written, written_alone, strict=True):
            x, y = (np.asarray(z[place[0][s], :, place[1][s]], np.float32) for z in (x, y))
            np.testing.assert_array_equal(x, y)
