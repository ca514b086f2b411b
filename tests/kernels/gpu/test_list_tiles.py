"""The grouped product's list of tiles, which is plain jnp: on any machine."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.gpu.grouped_matmul import list_tiles

M, X = 400, 5


@pytest.mark.parametrize("rows", [64, 128])
def test_every_row_is_in_one_tile_and_that_of_its_group(rows: int) -> None:
    tiles_of = jax.jit(partial(list_tiles, M=M, rows=rows))

    @given(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 80)), min_size=X, max_size=X))
    def check(sizes: list[int]) -> None:
        work, through = map(np.asarray, tiles_of(np.array(sizes, np.int32)))
        assert through[-1] <= len(work)
        found = np.full(M, -1)
        for row, low, high, group in work[: through[-1]]:
            assert row % 8 == 0 and low < rows and high > 0
            own = slice(row + max(low, 0), row + min(high, rows))
            assert (found[own] == -1).all()
            found[own] = group
        np.testing.assert_array_equal(found, np.repeat([*range(X), -1], [*sizes, M - sum(sizes)]))

    check()
