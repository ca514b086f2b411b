"""The noise of draws: the hash is the published one, and the logarithms lose nothing that a draw could notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.random import threefry2x32_p

from kernels_pallas.noise import gumbel, threefry

WORD = st.integers(0, 2**32 - 1)
ONES, PI = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def threefry_of(counter, key, rounds):
    """Threefry-2x32 in Python's integers, step by step as the paper has it."""
    key = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    words = [(counter[i] + key[i]) % 2**32 for i in range(2)]
    for i in range(rounds):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        words[0] = (words[0] + words[1]) % 2**32
        words[1] = (words[1] << rotation | words[1] >> (32 - rotation)) % 2**32 ^ words[0]
        if i % 4 == 3:
            n = i // 4 + 1
            words = [(words[0] + key[n % 3]) % 2**32, (words[1] + key[(n + 1) % 3] + n) % 2**32]
    return words


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([0] * 4, [0x9D1C5EC6, 0x8BD50731]),
        ([ONES] * 4, [0xFD36D048, 0x2D17272C]),
        (PI, [0xBA3E4725, 0xF27D669E]),
    ],
)
def test_what_the_hash_is_compared_with_has_the_published_answers(words, answer):
    """Random123's kat_vectors: threefry2x32, 13 rounds."""
    assert threefry_of(words[:2], words[2:], 13) == answer


@given(st.tuples(WORD, WORD), st.tuples(WORD, WORD))
def test_what_the_hash_is_compared_with_is_jax_s_given_more_rounds(counter, key):
    words = [jnp.uint32(word) for word in (*key, *counter)]
    assert [int(word) for word in threefry2x32_p.bind(*words)] == threefry_of(counter, key, 20)


@given(high=WORD, low=WORD, counter=WORD)
def test_hash_is_threefry_of_13_rounds(high, low, counter):
    words = threefry(*(jnp.full(1, word, jnp.uint32) for word in (high, low, counter)))
    assert [int(word[0]) for word in words] == threefry_of((0, counter), (high, low), 13)


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
