"""Decode attention on the GPU against the reference in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gpu.decode import decode_attention
from tests.kernels.gpu import paged

pytestmark = pytest.mark.gpu

SHAPES = [  # H, K, D, N
    (32, 8, 128, 64),
    (16, 8, 128, 16),
    (9, 3, 64, 16),
    (8, 8, 64, 64),
    (4, 1, 256, 32),
    (16, 1, 128, 128),
    (12, 2, 128, 64),
    (64, 8, 64, 128),
]
OPTIONS = [
    {},
    {"window": 100},
    {"window": 1024},
    {"soft_cap": 20.0},
    {"sinks": True},
    {"window": 300, "soft_cap": 50.0, "sinks": True},
]
EIGHT_BITS = [  # shape, options, dtype, the cache's: what differs between shapes, and each option, at least once
    (SHAPES[0], OPTIONS[0], "bfloat16", "int8"),
    (SHAPES[0], OPTIONS[5], "bfloat16", "float8_e4m3fn"),
    (SHAPES[1], OPTIONS[1], "bfloat16", "float8_e4m3fn"),
    (SHAPES[2], OPTIONS[2], "float16", "int8"),
    (SHAPES[4], OPTIONS[4], "bfloat16", "float8_e4m3fn"),
    (SHAPES[5], OPTIONS[0], "float16", "float8_e4m3fn"),
    (SHAPES[7], OPTIONS[3], "bfloat16", "int8"),
    ((2, 2, 256, 128), OPTIONS[2], "bfloat16", "int8"),  # blocks larger than a tile
    ((6, 2, 128, 8), OPTIONS[0], "bfloat16", "float8_e4m3fn"),  # of which the copy engine fetches scales of four
]
LENS = [1, 17, 64, 65, 255, 256, 257, 0, 700, 1024, 3000, 12345]


def case(seed, H, K, D, N, dtype, cache_dtype=None, sinks=False, lens=LENS, **options):
    key = jax.random.key(seed)
    tables, (cache,) = paged.pool(key, lens, K=K, D=D, N=N, dtype=cache_dtype or dtype)
    q = jax.random.normal(jax.random.fold_in(key, 1), (len(lens), H, D), jnp.float32).astype(dtype)
    options = dict(options, scale=D**-0.5 * 1.5)
    if sinks:
        options["sinks"] = jax.random.normal(jax.random.fold_in(key, 2), (H,)) * 2
    return q, cache, jnp.asarray(lens, jnp.int32), tables, options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_agrees_with_the_reference(shape, options, dtype):
    if dtype == jnp.float16 and shape not in SHAPES[:3]:
        pytest.skip("float16 differs in nothing that depends on these shapes")
    seed = int(np.random.default_rng().integers(1 << 30))
    q, cache, kv_lens, tables, options = case(seed, *shape, dtype, **options)
    jnp.full((1 << 28,), jnp.nan).block_until_ready()  # what is left unwritten is then NaN
    out = decode_attention(q, *cache, kv_lens, tables, **options)
    expected = paged.expected_decode(q, cache, kv_lens, tables, **options)
    assert paged.error(out, expected) < 1e-2, seed
    assert not np.asarray(out[LENS.index(0)]).any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_large_batches_are_merged_as_they_go(options):
    """Small ones are not, see decode.py."""
    q, cache, kv_lens, tables, options = case(5, 24, 12, 64, 16, jnp.bfloat16, lens=LENS * 6, **options)
    out = decode_attention(q, *cache, kv_lens, tables, **options)
    assert paged.error(out, paged.expected_decode(q, cache, kv_lens, tables, **options)) < 1e-2


@pytest.mark.parametrize("lens", [[900 + 7 * i for i in range(32)], [1000, 0] * 16, (LENS * 3)[:32]], ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=str)
def test_batches_of_about_as_many_heads_as_workers(lens, options):
    """Each worker has a whole sequence and head, or an equal share if lengths differ."""
    q, cache, kv_lens, tables, options = case(6, *SHAPES[1], jnp.bfloat16, lens=lens, **options)
    jnp.full((1 << 28,), jnp.nan).block_until_ready()
    out = decode_attention(q, *cache, kv_lens, tables, **options)
    assert paged.error(out, paged.expected_decode(q, cache, kv_lens, tables, **options)) < 1e-2
    assert not np.asarray(out)[np.asarray(lens) == 0].any()


@pytest.mark.parametrize("count", [3, 9], ids=["shares", "waves"])
def test_result_of_a_sequence_does_not_depend_on_its_neighbours(count):
    """In a batch whose splits are merged on the way, and alone, where they are not."""
    lens = (LENS * count)[: 32 if count == 3 else None]
    q, cache, kv_lens, tables, options = case(3, *SHAPES[0], jnp.bfloat16, lens=lens, sinks=True)
    together = decode_attention(q, *cache, kv_lens, tables, **options)
    for s in range(len(LENS)):
        alone = decode_attention(q[s : s + 1], *cache, kv_lens[s : s + 1], tables[s : s + 1], **options)
        np.testing.assert_array_equal(np.asarray(alone[0], np.float32), np.asarray(together[s], np.float32))


def test_calls_in_one_program_do_not_disturb_each_other():
    """One list of work serves them all."""
    q, cache, kv_lens, tables, options = case(4, *SHAPES[0], jnp.bfloat16)

    def attend(q):
        return decode_attention(q, *cache, kv_lens, tables, **options)

    together = jax.jit(lambda q: attend(attend(attend(q))))
    np.testing.assert_array_equal(
        np.asarray(together(q), np.float32), np.asarray(attend(attend(attend(q))), np.float32)
    )
    np.testing.assert_array_equal(np.asarray(together(q), np.float32), np.asarray(together(q), np.float32))
