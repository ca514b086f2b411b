"""The kernel that merges splits, interpreted, on any machine, against a softmax over all of them in float64."""

from functools import partial

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gpu.merge import Sinks, merge_splits, stored_rows

SPLITS = [1, 3, 6, 5, 0]
K, M = 2, 6


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))


def case(G, D):
    """What splits found, NaN where there are none; and sinks."""
    rng, rows = np.random.default_rng(), (len(SPLITS), K, M, stored_rows(G, D))
    parts, maxima = rng.standard_normal((*rows, D)), np.round(4 * rng.standard_normal(rows))
    found = parts, maxima, rng.uniform(1, 50, rows)
    for x in found:
        for seq, splits in enumerate(SPLITS):
            x[seq, :, splits:] = np.nan
    found = parts.reshape(*rows[:3], -1), *found[1:]
    return tuple(jnp.asarray(x, jnp.float32) for x in found), rng.standard_normal(K * G)


def expected(found, logits, G, D):
    """float64[S, K, G, D], zeros where there is no split."""
    parts, maxima, totals = (np.asarray(x, np.float64) for x in found)
    weights = np.where(np.isnan(maxima), 0, np.exp2(maxima))
    parts = parts.reshape(*maxima.shape, D)
    total = np.nansum(weights * totals, axis=2)[:, :, :G]
    if logits is not None:
        total = total + np.exp(logits).reshape(K, G)
    return np.nansum(weights[..., None] * parts, axis=2)[:, :, :G] / np.maximum(total, 1e-9)[..., None]


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("G", "D"), [(1, 64), (2, 64), (3, 64), (4, 128)])
def test_merged_is_what_one_softmax_gives(G, D, with_sinks):
    found, logits = case(G, D)
    logits = logits if with_sinks else None
    sinks = Sinks.of(jnp.asarray(logits, jnp.float32)) if with_sinks else None
    merged = merge_splits(found, jnp.asarray(SPLITS, jnp.int32), sinks, G, jnp.float32)
    by_head = merged.reshape(len(SPLITS), K, -1, D)[:, :, :G]
    np.testing.assert_allclose(by_head, expected(found, logits, G, D), rtol=1e-5, atol=1e-5)
