"""TPU generations, and topologies of them without the hardware."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from paged.errors import InvalidRequestError


@dataclass(frozen=True)
class Chip:
    """What one chip can do.

    Attributes:
      flops: of bfloat16, a second.
      hbm_bytes: of memory.
      bandwidth: bytes of it a second.
      vmem_bytes: of vector memory.
    """

    flops: float
    hbm_bytes: int
    bandwidth: float
    vmem_bytes: int


# Peak compute, memory and bandwidth a chip: cloud.google.com/tpu/docs, pages v5e, v5p and v6e, "System architecture".
# Vector memory: jax's pltpu.get_tpu_info().
CHIPS = {
    "v5e": Chip(flops=197e12, hbm_bytes=16 << 30, bandwidth=819e9, vmem_bytes=128 << 20),
    "v5p": Chip(flops=459e12, hbm_bytes=95 << 30, bandwidth=2765e9, vmem_bytes=64 << 20),
    "v6e": Chip(flops=918e12, hbm_bytes=32 << 30, bandwidth=1640e9, vmem_bytes=128 << 20),
}


def topology_devices(topology: str) -> tuple[Chip, Sequence[jax.Device]]:
    """Of "v5e:2x2" and the like: the kind of chip, and devices that one can compile for.

    Raises:
      InvalidRequestError: there is no such topology, or libtpu is not installed.
    """
    generation, _, layout = topology.partition(":")
    if generation not in CHIPS:
        raise InvalidRequestError(f"topology {topology!r} is not of {', '.join(CHIPS)}, such as v5e:2x2", "topology")
    try:
        import libtpu  # type: ignore[import-untyped]  # noqa: F401
    except ModuleNotFoundError:
        raise InvalidRequestError(
            "compiling for TPUs needs their compiler, which runs on any x86 Linux machine: pip install libtpu",
            "topology",
        ) from None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu looks for the metadata server of a Cloud TPU machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is touched, so several may compile at once
    from jax.experimental import topologies

    host = {"chips_per_host_bounds": (1, 1, 1)} if set(layout.split("x")) == {"1"} else {}  # else the usual hosts
    try:
        return CHIPS[generation], topologies.get_topology_desc(platform="tpu", topology_name=topology, **host).devices
    except Exception as e:  # whatever libtpu makes of the name
        raise InvalidRequestError(f"topology {topology!r} is not known to libtpu: {e}", "topology") from e
