"""Linear layers and norms on the GPU, against float32, and that a row's result never depends on the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import ACTIVATIONS
from kernels_pallas.gpu import linear, norm
from kernels_pallas.rotary import rms_norm

pytestmark = pytest.mark.gpu
SHAPES = [(576, 576), (1536, 576), (1280, 1280), (1024, 3072), (4096, 1024), (6144, 4096), (4096, 14336), (1000, 192),
          (49152, 576)]  # fmt: skip
ROWS = [1, 5, 8, 16, 40, 64, 65, 128, 192, 200, 256, 700]


def random(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng().standard_normal(shape), jnp.float32).astype(dtype)


def exact(x, kernel):
    with jax.default_matmul_precision("highest"):
        return x.astype(jnp.float32) @ kernel.astype(jnp.float32).T


def difference(y, expected):
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("features", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_products(features, columns, dtype):
    kernel = random(features, columns, dtype=dtype) / columns**0.5
    x = random(max(ROWS), columns, dtype=dtype)
    expected, whole = exact(x, kernel), None
    for rows in reversed(ROWS):
        parts = linear.linear_parts(x[:rows], kernel, out_dtype=jnp.float32)
        y = np.asarray(sum(parts[1:], start=parts[0]))
        assert difference(y, expected[:rows]) < 5e-7 * columns**0.5  # what sums in float32 round off
        whole = y if whole is None else whole
        assert (y == whole[:rows]).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("features", "columns"), [(1536, 576), (3072, 1024), (14336, 4096), (1000, 192)])
def test_gated(features, columns, activation):
    kernel = random(2 * features, columns) / columns**0.5
    x, act = random(max(ROWS), columns), ACTIVATIONS[activation]
    gate, up = jnp.split(exact(x, kernel), 2, axis=1)
    expected, whole = act(gate) * up, None
    for rows in reversed(ROWS):
        y = np.asarray(linear.gated_linear(x[:rows], kernel, act).astype(jnp.float32))
        assert difference(y, expected[:rows]) < 4e-3
        whole = y if whole is None else whole
        assert (y == whole[:rows]).all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("features", "columns"), [(4096, 4096), (4096, 14336), (5120, 192)])
def test_sums_and_what_becomes_their_norms(features, columns, offset):
    """All is rounded where it says, so but for the squares it is exact."""
    kernel, weight = random(features, columns) / columns**0.5, random(features)
    x, total, whole = random(256, columns), random(256, features) * 3, None
    for rows in [rows for rows in reversed(ROWS) if rows <= 256 and linear.can_add(x[:rows], kernel)]:
        found = linear.add_linear(total[:rows], x[:rows], kernel, weight, offset)
        product = linear.linear_parts(x[:rows], kernel)[0]
        added = (total[:rows].astype(jnp.float32) + product.astype(jnp.float32)).astype(jnp.bfloat16)
        wide = added.astype(jnp.float32)
        assert (found[0] == added).all()
        assert (found[1] == (wide * (weight.astype(jnp.float32) + offset)).astype(jnp.bfloat16)).all()
        assert difference(found[2].sum(axis=1), np.square(np.asarray(wide, np.float64)).sum(axis=1)) < 1e-6
        whole = whole or found
        assert all((a == b[:rows]).all() for a, b in zip(found, whole, strict=True))
    assert whole is not None


@pytest.mark.parametrize(("features", "columns", "partial"), [(6144, 4096, 128), (1000, 192, 8), (576, 576, 24)])
def test_products_of_rows_that_are_still_to_be_divided(features, columns, partial):
    """By their rms; a row that is not a number spoils no other."""
    kernel, x = random(2 * features, columns) / columns**0.5, random(256, columns).at[33, 7].set(jnp.nan)
    squares, right = jnp.square(random(256, partial, dtype=jnp.float32)) * 9, np.arange(256) != 33
    root = np.sqrt(np.asarray(squares, np.float64).sum(axis=1, keepdims=True) / columns + 1e-5)
    expected = np.asarray(exact(x, kernel)) / root
    gated = np.asarray(jax.nn.silu(expected[:, :features]) * expected[:, features:])
    whole = [None, None]
    for rows in [rows for rows in reversed(ROWS) if rows <= 256]:
        rms = linear.Rms(squares[:rows], 1e-5)
        parts = linear.linear_parts(x[:rows], kernel, out_dtype=jnp.float32, rms=rms)
        y = linear.gated_linear(x[:rows], kernel, jax.nn.silu, rms=rms)
        for i, (found, of, most) in enumerate([(parts.sum(axis=0), expected, 2e-6 * columns**0.5), (y, gated, 4e-3)]):
            found = np.asarray(found.astype(jnp.float32))
            assert difference(found[right[:rows]], of[:rows][right[:rows]]) < most
            assert np.isnan(found[~right[:rows]]).all()
            whole[i] = found if whole[i] is None else whole[i]
            assert np.array_equal(found, whole[i][:rows], equal_nan=True)


@pytest.mark.parametrize("features", [64, 576, 1024, 2560, 4096, 16384])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(features, offset):
    x, weight = random(max(ROWS), features) * 3, random(features)
    expected, whole = rms_norm(x.astype(jnp.float32), weight.astype(jnp.float32), 1e-6, offset), None
    for rows in reversed(ROWS):
        y = np.asarray(norm.rms_norm(x[:rows], weight, 1e-6, offset).astype(jnp.float32))
        assert difference(y, expected[:rows]) < 4e-3
        whole = y if whole is None else whole
        assert (y == whole[:rows]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize(
    ("features", "count"), [(60, 3), (64, 2), (576, 7), (896, 4), (1024, 4), (1024, 1), (2880, 1), (4096, 1), (8192, 8)]
)
def test_sums_and_their_norms(features, count, dtype):
    """Sums are rounded where it says, so they are exact; a row that is not a number spoils no other."""
    rows = 256
    x, weight = random(rows, features, dtype=dtype) * 3, random(features, dtype=dtype)
    parts = random(count, rows, features, dtype=dtype if count == 1 else jnp.float32)
    parts = parts.at[-1, 33, features - 1].set(jnp.nan)
    added = np.asarray(parts[0], np.float32)
    for part in parts[1:]:
        added = added + np.asarray(part)
    expected = np.asarray(x, np.float32) + np.asarray(jnp.asarray(added).astype(dtype), np.float32)
    expected = np.asarray(jnp.asarray(expected).astype(dtype), np.float32)
    normed = np.asarray(rms_norm(jnp.asarray(expected), weight.astype(jnp.float32), 1e-6, 1.0))
    right, whole = np.arange(rows) != 33, None
    for rows in (256, 40, 1):
        total, y = norm.add_rms_norm(x[:rows], parts[:, :rows], weight, 1e-6, 1.0)
        total, y = np.asarray(total, np.float32), np.asarray(y, np.float32)
        assert np.array_equal(total, expected[:rows], equal_nan=True)
        assert difference(y[right[:rows]], normed[:rows][right[:rows]]) < 4e-3
        assert np.isnan(y[~right[:rows]]).all()
        whole = y if whole is None else whole
        assert np.array_equal(y, whole[:rows], equal_nan=True)
