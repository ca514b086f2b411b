"""The decode kernel's list of work and how workers share it, which is plain jnp: on any machine."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.gpu.decode_work import TILE, Cuts, DecodeConfig, list_work, share_work

S, TOKENS = 9, 40_000
lengths = st.lists(st.one_of(st.just(0), st.integers(1, 700), st.integers(1, TOKENS)), min_size=S, max_size=S)


@pytest.mark.parametrize("window", [None, 100, 3000])
@pytest.mark.parametrize(("K", "sms", "waves"), [(1, 132, (1,)), (8, 132, (22, 2, 1)), (3, 2, (3, 1))])
def test_every_split_has_one_worker_and_workers_have_their_shares(K, sms, waves, window):
    config = DecodeConfig(min_split=256, max_splits=32, workers=2, stages=3, whole_until=0, waves=waves)
    weights = [weight for weight in waves for _ in range(sms)] * config.workers

    @jax.jit
    def shared(kv_lens):
        cuts = Cuts.of(kv_lens, TOKENS, window, config)
        return cuts, *list_work(cuts, kv_lens), share_work(cuts, K, config, sms)

    @given(lengths)
    def check(lens):
        cuts, work, count, shares = jax.tree.map(np.asarray, shared(jnp.asarray(lens, jnp.int32)))
        assert count[0] == cuts.splits.sum()
        assert (work[: count[0], 1] < work[: count[0], 2]).all() and not work[count[0] :].any()  # items without a tile
        items = []  # by sequence, head and split, as a worker reads them: tiles
        for seq, length in enumerate(lens):
            rows = work[: count[0]][work[: count[0], 0] == seq]
            assert len(rows) == cuts.splits[seq] <= cuts.most
            first_visible = max(length - window, 0) if window else 0
            assert len(rows) == 0 or (rows[0, 1] <= first_visible < rows[0, 1] + TILE)
            assert (rows[1:, 1] == rows[:-1, 2]).all() and (len(rows) == 0) == (length == 0)
            assert len(rows) == 0 or rows[-1, 2] == length
            assert (rows[:, 4] == np.arange(len(rows))).all() and (rows[:, 6] == len(rows)).all()
            assert (work[rows[:1, 5], 0] == seq).all() and (rows[:, 1] == rows[:1, 1] + rows[:, 4] * rows[:, 7]).all()
            items += list(-(-(rows[:, 2] - rows[:, 1]) // TILE)) * K
        assert shares[0] == 0 and shares[-1] == len(items) and (np.diff(shares) >= 0).all()
        for weight, (a, b) in zip(weights, pairwise(shares), strict=True):
            share = sum(items) * weight / sum(weights)
            assert abs(sum(items[a:b]) - share) <= max(items, default=0) + 1

    check()


@pytest.mark.parametrize(("K", "sms"), [(1, 5), (8, 132), (8, 30), (3, 15), (8, 5)])
def test_sequences_that_are_alike_are_not_cut_between_workers(K, sms):
    config = DecodeConfig(min_split=256, max_splits=32, workers=2, stages=3, waves=(5, 1))

    @jax.jit
    def shared(kv_lens):
        cuts = Cuts.of(kv_lens, TOKENS, None, config)
        return cuts, *(share_work(cuts, K, c, sms) for c in (config, replace(config, whole_until=0)))

    @given(lengths, st.integers(1, TOKENS // 2), st.booleans())
    def check(noise, length, alike):
        lens = [length + x % (8 * TILE) if x else 0 for x in noise] if alike else noise
        cuts, shares, by_tiles = jax.tree.map(np.asarray, shared(jnp.asarray(lens, jnp.int32)))
        tiles = -(-np.asarray([x for x in lens if x]) // TILE)
        count = len(tiles) * K
        enough = count <= 2 * sms and config.whole_until * 2 * sms >= S * K
        if not enough or len(tiles) * (tiles.max(initial=0) - config.alike) > tiles.sum():
            assert (shares == by_tiles).all()
            return
        begins = np.cumsum([0, *np.repeat(cuts.splits[cuts.splits > 0], K)])
        first, rest = np.diff(shares).reshape(2, 2, sms).swapaxes(0, 1)  # workers of a CTA, waves, SMs
        assert not rest.any() and first.sum() == begins[-1]
        assert (first.flat[:count] == np.diff(begins)).all()

    check()


def test_short_splits_come_last_if_asked_for():
    config = DecodeConfig(min_split=256, max_splits=32, workers=2, stages=3)

    @jax.jit
    def listed(kv_lens):
        cuts = Cuts.of(kv_lens, TOKENS, None, config)
        return cuts.splits, *(list_work(cuts, kv_lens, short_last) for short_last in (True, False))

    @given(lengths)
    def check(lens):
        splits, (work, count), (by_sequence, _) = jax.tree.map(np.asarray, listed(jnp.asarray(lens, jnp.int32)))
        work, by_sequence = work[: count[0]], by_sequence[: count[0]]
        order = np.lexsort((work[:, 4], work[:, 0]))
        assert (work[order] == by_sequence).all()
        tokens, size = work[:, 2] - work[:, 1], work[:, 7]
        lasts = (splits > 0).sum()
        assert (tokens[: len(work) - lasts] == size[: len(work) - lasts]).all()
        assert (work[len(work) - lasts :, 4] + 1 == work[len(work) - lasts :, 6]).all()

    check()


def test_the_list_of_one_sequence_is_as_among_others():
    config = DecodeConfig(min_split=256, max_splits=32, workers=2, stages=3)
    work_of = jax.jit(lambda lens: list_work(Cuts.of(lens, TOKENS, None, config), lens))
    for length in (0, 1, 256, 257, 8192, 9000, TOKENS):
        (alone, one), (among, two) = (work_of(jnp.asarray(lens, jnp.int32)) for lens in ([length], [length, 0]))
        assert one == two and (alone == among[: len(alone)]).all() and not among[len(alone) :].any()


def test_one_worker_has_all():
    config = DecodeConfig(min_split=256, max_splits=32, workers=1, stages=3, waves=(1,))
    cuts = Cuts.of(jnp.asarray([1000, 0, 3]), TOKENS, None, config)
    assert share_work(cuts, 4, config, 1).tolist() == [0, 4 * 4 + 4]
