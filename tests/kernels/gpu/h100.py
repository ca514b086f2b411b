"""An H100 that is not there: the real compiler for it, from jax's CUDA plugin and nothing else of CUDA."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

# Of a process that compiles:
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


@contextmanager
def h100() -> Iterator[NamedSharding]:
    """Within, what is traced is for an H100; gives the sharding of arrays on it."""
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=target
    )  # fmt: skip
    device = topology.devices[0]
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), (), abstract_device=abstract)):
        yield NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())


def compile_for(sharding: NamedSharding, function, *args, donate=()) -> jax.stages.Compiled:
    traced = jax.jit(function, in_shardings=sharding, donate_argnums=donate).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).compile()
