"""The prefill kernel's list of work, which is plain jnp: on any machine."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.gpu.prefill_work import list_work

T, S, TILE = 500, 6, 128
sequences = st.lists(st.tuples(st.integers(1, 80), st.integers(0, 900)), max_size=S)  # new tokens, those before them


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("tokens", [64, 128])
def test_every_row_walks_once_over_what_it_sees_the_longest_first(tokens, window):
    work_of = jax.jit(partial(list_work, T, tokens=tokens, tile=TILE, window=window))

    @given(sequences, st.integers(0, S))
    def check(seqs, num_decodes):
        seqs = [(1, before) for _, before in seqs[:num_decodes]] + seqs[num_decodes:]
        pad = [0] * (S - len(seqs))
        cu_q_lens = np.cumsum([0, *(new for new, _ in seqs), *pad])
        kv_lens = np.array([new + before for new, before in seqs] + pad)
        num_seqs = np.array([min(num_decodes, len(seqs)), len(seqs)])
        work, count = work_of(*(jnp.asarray(x, jnp.int32) for x in (kv_lens, cu_q_lens, num_seqs)))
        work = np.asarray(work)[: int(count[0])]
        visits = np.zeros(T, int)
        for row, low, high, position, begin, end, s, _ in work:
            assert row % 8 == 0
            for r in range(max(low, 0), min(high, tokens)):
                visits[row + r] += 1
                if s == len(seqs):
                    assert begin == end
                    continue
                assert cu_q_lens[s] <= row + r < cu_q_lens[s + 1]
                last = kv_lens[s] - cu_q_lens[s + 1] + row + r
                assert position + r == last
                first = 0 if window is None else max(last - window + 1, 0)
                assert begin * TILE <= first and last < end * TILE
        assert (visits == (np.arange(T) >= cu_q_lens[num_seqs[0]])).all()
        walks = work[:, 5] - work[:, 4]
        assert (np.diff(walks) <= 0).all()

    check()
