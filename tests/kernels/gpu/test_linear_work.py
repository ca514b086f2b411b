"""How a linear layer is cut on an H100, which needs none."""

import jax
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas.gpu.linear_work import SHARED_MEMORY, LinearConfig
from kernels_pallas.gpu.rows import ROWS

H100 = AbstractMesh(
    (), (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
)


@given(st.integers(1, 2000), st.integers(1, 4000), st.integers(1, 500), st.booleans())
def test_a_cut_covers_the_weights_and_fits(M, eights, columns, gated):
    F, C, halves = 8 * eights, 64 * columns, 1 + gated
    with jax.sharding.use_abstract_mesh(H100):
        config, of_one_row = LinearConfig.of(M, F, C, gated), LinearConfig.of(1, F, C, gated)
    assert F % config.features == 0 and C % config.depth == 0
    assert config.features * halves <= 256  # of one wgmma
    assert config.splits == of_one_row.splits  # a row's sum does not depend on how many rows there are
    assert config.stages >= 3  # two that warpgroups may work on, and one on its way
    stage = (ROWS * config.warpgroups + halves * config.features) * config.depth * 2
    assert config.stages * stage <= SHARED_MEMORY
