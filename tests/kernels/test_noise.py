"""The noise of draws: the kernels' hash is XLA's, and the logarithms lose nothing that a draw could notice."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.noise import gumbel, hash_in_kernel, hash_through_xla

WORD = st.integers(0, 2**32 - 1)


def test_hash_has_the_published_answer():
    """Random123's kat_vectors: threefry2x32, 20 rounds, all zeros."""
    zero = jnp.zeros(1, jnp.uint32)
    for function in (hash_in_kernel, hash_through_xla):
        assert [int(word[0]) for word in function(zero, zero, zero)] == [0x6B200159, 0x99BA4EFE]


@given(high=WORD, low=WORD, counter=WORD)
def test_both_hashes_are_one(high, low, counter):
    words = [jnp.full(1, word, jnp.uint32) for word in (high, low, counter)]
    assert jnp.array_equal(jnp.stack(hash_in_kernel(*words)), jnp.stack(hash_through_xla(*words)))


def test_gumbel_is_as_precise_as_the_scores_it_is_added_to():
    """Within 1e-6 of float64, or a millionth, but for the hundredth of draws that is least: those do not win."""
    rng = np.random.default_rng(0)
    words = np.concatenate([rng.integers(0, 2**bits, 100_000, np.uint64) for bits in range(8, 33)])
    u = (np.floor(words / 2) + 0.5) * 2.0**-31
    exact = -np.log(-np.log1p(-u))
    found = np.asarray(jax.jit(gumbel)(words.astype(np.uint32)), np.float64)
    ordinary = u < 0.99
    assert (np.abs(found - exact) <= 1e-6 * np.maximum(1, np.abs(exact)))[ordinary].all()
    assert np.isfinite(found).all()
