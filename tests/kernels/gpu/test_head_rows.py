"""What the output head's kernel is given and what is made of what it finds: plain jnp, on any machine."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.gpu.head import _of_rows, best_of_all


@given(st.data(), st.integers(1, 6), st.integers(1, 5))
def test_the_lowest_token_of_the_best_score(data, clusters, rows):
    values = st.sampled_from([-np.inf, -1.0, 0.0, 2.5, np.inf])
    column = st.lists(values, min_size=rows, max_size=rows)
    scores = np.array(data.draw(st.lists(column, min_size=clusters, max_size=clusters)), np.float32)
    tokens = np.random.default_rng().integers(-1, 50, scores.shape).astype(np.int32)
    expected = [
        min(t for s, t in zip(*pair, strict=True) if s == max(pair[0])) for pair in zip(scores.T, tokens.T, strict=True)
    ]
    assert np.array_equal(best_of_all(jnp.asarray(scores), jnp.asarray(tokens), 50), expected)


def test_rows_of_padding_are_greedy():
    keys = jnp.arange(6, dtype=jnp.uint32).reshape(2, 3)
    keys_found, factors = _of_rows(keys, jnp.asarray([0.5, 0.0, 2.0]), 8)
    assert np.array_equal(keys_found, np.pad(np.asarray(keys), ((0, 0), (0, 5))))
    assert np.array_equal(factors[:, :3], [[2, 1, 0.5], [1, 0, 1]]) and not factors[:, 3:].any()
