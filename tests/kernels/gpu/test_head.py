"""The output head that takes tokens on the GPU, against float32 logits and the noise of draws through XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gpu import head
from kernels_pallas.gpu.linear import linear_parts
from kernels_pallas.noise import PAIR, RUN, gumbel, threefry

pytestmark = pytest.mark.gpu
SHAPES = [(256, 64), (320, 576), (32064, 192), (151936, 1024)]
ALL = 300
ROWS = [ALL, 256, 129, 128, 65, 64, 9, 8, 1]
ROUNDING = 2e-5  # of a score: sums in another order, and the kernel's approximate logarithms


def random(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng().standard_normal(shape), jnp.float32).astype(dtype)


def case(V, C, M, dtype=jnp.bfloat16):
    """x, kernel, keys and temperatures, of which every third is 0."""
    rng = np.random.default_rng()
    keys = jnp.asarray(rng.integers(0, 1 << 32, (M, 2), np.uint64), jnp.uint32)
    temperature = jnp.where(jnp.arange(M) % 3 == 1, 0, jnp.asarray(rng.uniform(0.3, 2, M), jnp.float32))
    return random(M, C, dtype=dtype), random(V, C, dtype=dtype) * 3 / C**0.5, keys, temperature


@jax.jit
def scores_of(x, kernel, keys, temperature):
    """float32[M, V], and without noise."""
    logits = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32).T, precision="highest")
    ids = jnp.arange(kernel.shape[0])
    counters = jnp.broadcast_to((ids // PAIR * RUN + ids % RUN).astype(jnp.uint32), logits.shape)
    high, low = (jnp.broadcast_to(key[:, None], logits.shape) for key in keys.T)
    noise = gumbel(jnp.where(ids % PAIR < RUN, *threefry(high, low, counters)))
    drawn = temperature[:, None] > 0
    return jnp.where(drawn, logits / jnp.where(drawn, temperature[:, None], 1) + noise, logits), logits


@jax.jit
def behind(scores, tokens):
    """How far the tokens' scores are below the best."""
    return jnp.max(scores, axis=1) - jnp.take_along_axis(scores, tokens[:, None], axis=1)[:, 0]


def assert_best(tokens, scores):
    assert (tokens >= 0).all() and (tokens < scores.shape[1]).all()
    gaps = np.asarray(behind(scores, tokens))
    assert (gaps <= ROUNDING * np.maximum(1, np.abs(scores).max(axis=1))).all()
    assert (gaps == 0).mean() > 0.95  # where two are so close is rare


@pytest.mark.parametrize(("V", "C"), SHAPES)
def test_tokens_have_the_best_scores_and_are_the_same_in_any_company(V, C):
    x, kernel, keys, temperature = case(V, C, ALL)
    for M in ROWS:
        drawn = head.best_tokens(x[:M], kernel, keys[:M], temperature[:M])
        greedy = head.best_tokens(x[:M], kernel)
        if M == ALL:
            scores, logits = scores_of(x, kernel, keys, temperature)
            assert_best(drawn, scores)
            assert_best(greedy, logits)
            assert (drawn == greedy)[temperature == 0].all()
            all_drawn, all_greedy = drawn, greedy
        assert (drawn == all_drawn[:M]).all() and (greedy == all_greedy[:M]).all()


@pytest.mark.parametrize("M", [1, 64, 130])
def test_greedy_tokens_are_to_the_bit_those_of_the_linear_kernel_s_logits(M):
    x, kernel, _, _ = case(49152, 576, M)
    assert (head.best_tokens(x, kernel) == jnp.argmax(linear_parts(x, kernel, out_dtype=jnp.float32)[0], axis=1)).all()


@pytest.mark.parametrize("M", [3, 64, 100, 256])
def test_padding_never_wins(M):
    """Neither the tokens behind the last, whose logits would be 0, nor the rows."""
    for V in (320, 4096 + 64, 4096 + 128, 4096 + 192):
        x, kernel, keys, temperature = case(V, 128, M)
        x, kernel = abs(x), -abs(kernel) * 100
        scores, logits = scores_of(x, kernel, keys, temperature)
        assert_best(head.best_tokens(x, kernel, keys, temperature), scores)
        assert_best(head.best_tokens(x, kernel), logits)


@pytest.mark.parametrize("M", [1, 64, 200])
def test_the_lowest_of_equals_wins(M):
    x, kernel, _, _ = case(4096, 128, M)
    same = jnp.broadcast_to(kernel[:1], kernel.shape)
    assert (head.best_tokens(x, same) == 0).all()
    spread = jnp.tile(kernel[:500], (9, 1))[:4096]
    tokens = head.best_tokens(x, spread)
    assert (tokens < 500).all()
    assert_best(tokens, scores_of(x, spread, jnp.zeros((M, 2), jnp.uint32), jnp.zeros(M))[1])


@pytest.mark.parametrize("M", [2, 64, 130, 256])
def test_not_a_number_is_found_and_stays_in_its_row(M):
    x, kernel, keys, temperature = case(4160, 192, M)
    bad = np.arange(M) % 5 == 1
    for arguments in ((keys, temperature), ()):
        good = head.best_tokens(x, kernel, *arguments)
        tokens = head.best_tokens(jnp.where(bad[:, None], jnp.nan, x), kernel, *arguments)
        assert (tokens == jnp.where(bad, -1, good)).all()
        for token in (0, 300, 4159):
            assert (head.best_tokens(x, kernel.at[token, 0].set(jnp.nan), *arguments) == -1).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("config", [(1, 1, 64, 64, 4), (2, 1, 128, 64, 4), (2, 1, 64, 64, 4), (2, 2, 128, 64, 4),
                                    (1, 2, 32, 64, 2), (1, 1, 128, 128, 2)], ids=str)  # fmt: skip
def test_every_way_to_cut_the_work(config, dtype):
    arguments = case(10112, 256, 150, dtype)
    tokens = head.best_tokens(*arguments, config=head.HeadConfig(*config))
    assert_best(tokens, scores_of(*arguments)[0])
