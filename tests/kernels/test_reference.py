"""The reference attention against a dense float64 softmax, sequence by sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    AttentionBatch,
    UnsupportedShapeError,
    cache_shape,
    latent_cache_shape,
    qkv_attention,
    quantize,
    ragged_paged_attention,
    reference,
)

BLOCK = 8


def dense(q, k, v, start, *, scale, window=None, soft_cap=None, sinks=None):
    """q [Q, H, D] at positions start.. over k, v [L, K, D], in float64."""
    Q, H, D = q.shape
    L, K, _ = k.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
    scores = np.einsum("qhd,lhd->hql", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    position, cached = start + np.arange(Q)[:, None], np.arange(L)[None, :]
    seen = cached <= position
    if window is not None:
        seen &= cached > position - window
    scores = np.where(seen[None], scores, -np.inf)
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (H, Q, 1))], -1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("hql,lhd->qhd", p[..., :L], v)


class RaggedBatch:
    """Random sequences with cached prefixes in a shuffled pool; the first `num_decodes` have one new token."""

    def __init__(self, rng, lens, *, H, K, D, S, T, num_decodes, dtype=np.float32, num_blocks=300):
        self.rng, self.lens, self.T, self.S = rng, lens, T, S
        P = max(-(-total // BLOCK) for total, _ in lens) + 1
        free = list(rng.permutation(np.arange(1, num_blocks)))
        tables = np.zeros((S, P), np.int32)
        kv_lens, cu = np.zeros(S, np.int32), np.zeros(S + 1, np.int32)
        self.k = [rng.standard_normal((total, K, D)).astype(dtype) for total, _ in lens]
        self.v = [rng.standard_normal((total, K, D)).astype(dtype) for total, _ in lens]
        self.q = [rng.standard_normal((new, H, D)).astype(dtype) for _, new in lens]
        shape = cache_shape(num_blocks, BLOCK, K, D, dtype, backend="reference")
        keys, values = (rng.standard_normal(s.shape).astype(dtype) * 50 for s in shape)  # poison
        for s, (total, new) in enumerate(lens):
            for b in range(-(-total // BLOCK)):
                tables[s, b] = free.pop()
            for p in range(total - new):
                keys[tables[s, p // BLOCK], :, p % BLOCK] = self.k[s][p]
                values[tables[s, p // BLOCK], :, p % BLOCK] = self.v[s][p]
            kv_lens[s], cu[s + 1] = total, cu[s] + new
        cu[len(lens) + 1 :] = cu[len(lens)]
        self.cu = cu
        flat = [rng.standard_normal((T, h, D)).astype(dtype) * 50 for h in (H, K, K)]
        for s, (total, new) in enumerate(lens):
            rows = slice(cu[s], cu[s + 1])
            flat[0][rows], flat[1][rows], flat[2][rows] = self.q[s], self.k[s][total - new :], self.v[s][total - new :]
        self.args = [jnp.asarray(x) for x in flat]
        self.cache = (jnp.asarray(keys), jnp.asarray(values))
        self.batch = AttentionBatch(
            jnp.asarray(kv_lens), jnp.asarray(tables), jnp.asarray(cu),
            jnp.asarray([num_decodes, len(lens)], jnp.int32), decode_only=num_decodes == len(lens) and T == S,
        )  # fmt: skip

    def check(self, *, atol, **options):
        run = jax.jit(lambda q, k, v, c, b: ragged_paged_attention(q, k, v, c, b, backend="reference", **options))
        out, (keys, values) = run(*self.args, self.cache, self.batch)
        tables = np.asarray(self.batch.block_tables)
        for s, (total, new) in enumerate(self.lens):
            expected = dense(self.q[s], self.k[s], self.v[s], total - new, **options)
            np.testing.assert_allclose(np.asarray(out[self.cu[s] : self.cu[s + 1]], np.float64), expected, atol=atol)
            stored = np.asarray(keys)[tables[s]].transpose(0, 2, 1, 3).reshape(-1, *self.k[s].shape[1:])[:total]
            np.testing.assert_array_equal(stored, self.k[s])
        assert not np.asarray(out[self.cu[len(self.lens)] :]).any()  # padding rows


OPTIONS = [
    {},
    {"window": 5},
    {"window": 40},
    {"soft_cap": 3.0},
    {"sinks": True},
    {"window": 17, "soft_cap": 5.0, "sinks": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("H", "K", "D"), [(4, 4, 16), (6, 2, 8), (8, 1, 32)])
def test_matches_dense_softmax(options, H, K, D):
    rng = np.random.default_rng(H * 100 + D)
    options = dict(options, scale=D**-0.5)
    if options.get("sinks"):
        options["sinks"] = jnp.asarray(rng.standard_normal(H) * 2, jnp.float32)
    heads = {"H": H, "K": K, "D": D}
    decodes = [(int(n), 1) for n in rng.integers(1, 300, 5)]
    prompts = [(200, 200), (150, 1), (7, 7), (290, 131)]
    RaggedBatch(rng, decodes, S=7, T=7, num_decodes=5, **heads).check(atol=2e-5, **options)
    RaggedBatch(rng, prompts, S=6, T=400, num_decodes=0, **heads).check(atol=2e-5, **options)
    RaggedBatch(rng, decodes[:3] + prompts, S=8, T=350, num_decodes=3, **heads).check(atol=2e-5, **options)


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.05), ("float8_e4m3fn", 0.25)])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_eight_bits(dtype, error, options):
    """Tightly what the stored keys and values give, the step's own among them, and roughly what unrounded ones do."""
    rng = np.random.default_rng(4)
    H, K, D = 6, 2, 32
    options = dict(options, scale=D**-0.5)
    if options.get("sinks"):
        options["sinks"] = jnp.asarray(rng.standard_normal(H) * 2, jnp.float32)
    lens = [(250, 1), (3, 1), (130, 50), (9, 9)]
    case = RaggedBatch(rng, lens, S=6, T=70, num_decodes=2, H=H, K=K, D=D)
    (keys, key_scales), (values, value_scales) = (quantize(x, dtype) for x in case.cache)
    cache = (keys, values, key_scales, value_scales)
    shapes = cache_shape(len(keys), BLOCK, K, D, dtype, backend="reference")
    assert [(x.shape, x.dtype) for x in cache] == [(x.shape, x.dtype) for x in shapes]
    run = jax.jit(lambda cache: ragged_paged_attention(*case.args, cache, case.batch, backend="reference", **options))
    out, written = run(cache)

    def rounded(x):
        stored, scales = quantize(jnp.asarray(x), dtype)
        return np.asarray(stored.astype(jnp.float32)) * np.asarray(scales)[..., None]

    tables = np.asarray(case.batch.block_tables)
    for s, (total, new) in enumerate(lens):
        mine = np.asarray(out[case.cu[s] : case.cu[s + 1]])
        exact = dense(case.q[s], rounded(case.k[s]), rounded(case.v[s]), total - new, **options)
        np.testing.assert_allclose(mine, exact, atol=3e-5)
        np.testing.assert_allclose(mine, dense(case.q[s], case.k[s], case.v[s], total - new, **options), atol=error)
        stored = (np.asarray(written[i].astype(jnp.float32))[tables[s]] for i in (1, 3))
        stored, scales = (np.moveaxis(x, 1, 2).reshape(-1, *x.shape[1:2], *x.shape[3:])[:total] for x in stored)
        np.testing.assert_array_equal(stored * scales[..., None], rounded(case.v[s]))


def test_latent_vectors_are_not_stored_in_eight_bits():
    with pytest.raises(UnsupportedShapeError, match="set kv_cache_dtype to auto"):
        latent_cache_shape(9, BLOCK, 24, "int8")


def test_fewer_tokens_than_sequence_rows():
    rng = np.random.default_rng(0)
    batch = RaggedBatch(rng, [(9, 1), (3, 3)], H=4, K=2, D=8, S=16, T=8, num_decodes=1)
    batch.check(atol=2e-5, scale=0.3)


def test_values_may_be_the_keys():
    """A cache of one array gives what two equal ones do, in decodes and prompts."""
    batch = RaggedBatch(
        np.random.default_rng(0), [(90, 1), (33, 33), (40, 9)], H=4, K=1, D=24, S=4, T=50, num_decodes=1
    )
    q, k, _ = batch.args
    keys = batch.cache[0]
    (shape,) = latent_cache_shape(*keys.shape[::2], 24, keys.dtype)
    assert (shape.shape, shape.dtype) == (keys.shape, keys.dtype)
    run = jax.jit(lambda v, cache: ragged_paged_attention(q, k, v, cache, batch.batch, backend="reference", scale=0.2))
    (out, cache), (expected, pair) = run(None, (keys,)), run(k, (keys, keys))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(cache[0], pair[0])
    assert len(cache) == 1


def test_a_backend_without_a_kernel_for_it_says_so(caplog):
    batch = RaggedBatch(np.random.default_rng(0), [(9, 1)], H=4, K=1, D=24, S=2, T=2, num_decodes=1)
    q, k, _ = batch.args
    cache = batch.cache[:1]
    out = [
        ragged_paged_attention(q, k, None, cache, batch.batch, backend=backend, scale=0.2)[0]
        for backend in ("reference", "mosaic_gpu")
    ]
    np.testing.assert_array_equal(*out)
    assert "plain XLA" in caplog.text


@pytest.mark.parametrize("backend", ["reference", "mosaic_gpu"])
def test_parts_of_a_projection_are_added_in_order_and_rounded(backend):
    """By plain jnp too, which serves heads that a backend has no kernel for."""
    H, K, D, T = 4, 1, 24, 7
    rng = np.random.default_rng(0)
    batch = RaggedBatch(rng, [(40, 1), (5, 5)], H=H, K=K, D=D, S=T, T=T, num_decodes=1, dtype=jnp.bfloat16)
    parts = rng.standard_normal((3, T, H + 2 * K, D)).astype(np.float32)
    whole = ((parts[0] + parts[1]) + parts[2]).astype(jnp.bfloat16)
    angles = rng.standard_normal((T, 1, D // 2)).astype(np.float32)
    run = jax.jit(
        lambda parts: qkv_attention(
            parts, (jnp.cos(angles), jnp.sin(angles)), None, batch.cache, batch.batch, num_heads=H,
            dtype=jnp.bfloat16, scale=0.2, backend=backend,
        )
    )  # fmt: skip
    for ours, expected in zip(*(jax.tree.leaves(run(x)) for x in (parts, whole[None])), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours.astype(jnp.float32), expected.astype(jnp.float32))


def test_result_of_a_sequence_does_not_depend_on_its_neighbours():
    """Bit for bit, for decodes and for prompts, whatever the neighbours' lengths."""
    lens = [(90, 1), (400, 1), (33, 33)]
    alone = RaggedBatch(np.random.default_rng(1), lens[:1], H=4, K=2, D=16, S=4, T=40, num_decodes=1)
    full = RaggedBatch(np.random.default_rng(2), lens, H=4, K=2, D=16, S=4, T=40, num_decodes=2)
    full.args = [x.at[0].set(y[0]) for x, y in zip(full.args, alone.args, strict=True)]
    for ours, theirs in zip(full.batch.block_tables[0], alone.batch.block_tables[0], strict=False):
        full.cache = tuple(f.at[ours].set(a[theirs]) for f, a in zip(full.cache, alone.cache, strict=True))
    run = jax.jit(lambda q, k, v, c, b: ragged_paged_attention(q, k, v, c, b, backend="reference", scale=0.25)[0])
    np.testing.assert_array_equal(
        run(*alone.args, alone.cache, alone.batch)[0], run(*full.args, full.cache, full.batch)[0]
    )


@pytest.mark.parametrize(("H", "K", "D"), [(4, 1, 32), (9, 3, 64), (4, 2, 8), (16, 8, 128)])
def test_a_decode_is_the_same_bits_in_any_company(H: int, K: int, D: int) -> None:
    rng = np.random.default_rng(0)
    cache = tuple(jnp.asarray(rng.normal(size=(90, K, 16, D)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(16, H, D)), jnp.float32)
    lens = jnp.asarray(rng.integers(1, 250, 16), jnp.int32)
    tables = jnp.asarray(rng.integers(1, 90, (16, 16)), jnp.int32)
    attend = jax.jit(
        lambda *a: reference.attend_decodes(a[0], cache, a[1], a[2], reference.Options(0.3, None, None, None))
    )
    together = np.asarray(attend(q, lens, tables))
    for S in (1, 2, 3, 5, 8):
        np.testing.assert_array_equal(np.asarray(attend(q[:S], lens[:S], tables[:S])), together[:S])
