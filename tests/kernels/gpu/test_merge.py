"""The kernel that merges splits, interpreted, on any machine, against a softmax over all of them in float64."""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kernels_pallas.gpu import merge as merging
from kernels_pallas.gpu.merge import Sinks, Unfinished, clear, merge, merge_splits, stored_rows
from kernels_pallas.gpu.rows import PARAMS

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
@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize(("G", "D"), [(1, 64), (2, 64), (3, 64), (4, 128), (2, 256)])
def test_merged_is_what_one_softmax_gives(G, D, with_sinks, sms, monkeypatch):
    monkeypatch.setattr(merging, "num_sms", lambda: sms)
    found, logits = case(G, D)
    logits = logits if with_sinks else None
    sinks = Sinks.of(jnp.asarray(logits, jnp.float32)) if with_sinks else None
    merged = merge_splits(found, jnp.asarray(SPLITS, jnp.int32), sinks, G, jnp.float32)
    by_head = merged.reshape(len(SPLITS), K, -1, D)[:, :, :G]
    np.testing.assert_allclose(by_head, expected(found, logits, G, D), rtol=1e-5, atol=1e-5)


def finished(found, splits, sinks, out, unfinished):
    """`out` after workers of two rows a head, one for each of int32[workers, 4], an Unfinished or -1 first, have merged
    what was left and cleared their shares."""

    def finish(found, splits, sinks, unfinished, out):
        worker, workers = lax.axis_index("worker"), jnp.int32(len(unfinished))
        left = Unfinished(*(unfinished[worker, i] for i in range(len(Unfinished._fields))))
        pl.when(left.seq >= 0)(lambda: merge(found, left, sinks, out, 2))
        clear(out, splits, worker, workers)

    in_place = jax.new_ref(out)
    grid = {"grid": (len(unfinished),), "grid_names": ("worker",)}
    plgpu.kernel(finish, out_type=(), compiler_params=PARAMS, **grid)(found, splits, sinks or (), unfinished, in_place)
    return jax.freeze(in_place)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_only_what_workers_left_is_merged_and_sequences_without_splits_are_cleared(with_sinks):
    """By three workers for five sequences, one of which left nothing."""
    found, logits = case(2, 64)
    sinks = Sinks.of(jnp.asarray(logits, jnp.float32)) if with_sinks else None
    splits = jnp.asarray(SPLITS, jnp.int32)
    merged = merge_splits(found, splits, sinks, 2, jnp.float32)
    unfinished = jnp.asarray([[1, 0, 3, 1], [-1, 0, 0, 0], [2, 1, 6, 1]], jnp.int32)
    done = finished(found, splits, sinks, jnp.full_like(merged, 7), unfinished)
    left = np.zeros((len(SPLITS), K), bool)
    left[1, 0] = left[2, 1] = left[4] = True
    np.testing.assert_array_equal(done, np.where(left[:, :, None], merged, 7))


def test_splits_merged_before_are_part_0():
    found, _ = case(2, 64)
    splits = jnp.asarray(SPLITS, jnp.int32)
    left = jnp.zeros((len(SPLITS), K, 128), jnp.float32), jnp.asarray([[2, 0, 6, 4]], jnp.int32)
    done = finished(found, splits, None, *left)
    here = [x.at[2, 0, 1:4].set(jnp.nan) for x in found]
    assert jnp.array_equal(finished(tuple(here), splits, None, *left), done)
    three = tuple(x.at[2, 0, 1:3].set(x[2, 0, 4:6]) for x in found)
    assert jnp.array_equal(done[2, 0], merge_splits(three, splits.at[2].set(3), None, 2, jnp.float32)[2, 0])
