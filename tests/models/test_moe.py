"""Routing: how a GPU finds the best experts and sorts by expert, against XLA's own operations."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

from models import moe
from models.experts_config import ExpertsConfig


@given(hnp.arrays(np.float32, (3, 9), elements=st.integers(-3, 3)), st.sampled_from([1, 4, 9]))
def test_the_best_by_rank_are_the_best(scores: np.ndarray, k: int) -> None:
    """Of equal ones, the first, as lax.top_k has it."""
    values, chosen = moe.top_k_by_rank(jnp.asarray(scores), k)
    expected_values, expected = lax.top_k(scores, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(chosen, expected)


@given(hnp.arrays(np.int32, 24, elements=st.integers(0, 6)))
def test_sorting_by_rank_is_sorting(experts: np.ndarray) -> None:
    for order, place in (moe.sort(jnp.asarray(experts)), moe.sort_by_rank(jnp.asarray(experts))):
        np.testing.assert_array_equal(order, np.argsort(experts, kind="stable"))
        np.testing.assert_array_equal(np.asarray(order)[place], np.arange(24))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_normalised_weights_are_a_softmax_over_the_chosen(scale: float) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    config = ExpertsConfig(count=12, chosen=3, intermediate_size=8, layers=(True,), scale=scale)
    weights, chosen = moe.route(jnp.asarray(logits), config)
    scores = np.exp(logits.astype(np.float64))
    scores /= scores.sum(axis=1, keepdims=True)
    best = np.argsort(-scores, axis=1)[:, :3]
    np.testing.assert_array_equal(chosen, best)
    of_best = np.take_along_axis(scores, best, axis=1)
    np.testing.assert_allclose(weights, scale * of_best / of_best.sum(axis=1, keepdims=True), rtol=1e-5)
