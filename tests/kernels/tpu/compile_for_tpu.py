"""Compiles programs for a TPU, on any x86 machine that has libtpu.

python -m tests.kernels.tpu.compile_for_tpu v5e '[{"H": 32, ...}, ...]' prints a line of JSON for each attention kernel.
"""

import json
import os
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kernels_pallas import AttentionBatch, cache_shape, ragged_paged_attention
from kernels_pallas.tpu import kernel
from kernels_pallas.tpu.layout import Blocks, Layout

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def compile_for(generation: str, function, *arguments, donate: tuple[int, ...]):
    """`function` of shapes, for one chip; the arguments `donate` are updated in place."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    device = topology.devices[0]
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    on_chip = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), (), abstract_device=abstract)):
        traced = jax.jit(function, in_shardings=on_chip, donate_argnums=donate).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def copies_of(text: str, shape: jax.ShapeDtypeStruct) -> list[str]:
    """The instructions of a compiled module that make another array of `shape`, whatever its layout."""
    dtype = {"bfloat16": "bf16", "float32": "f32", "int8": "s8", "float8_e4m3fn": "f8e4m3fn"}[shape.dtype.name]
    array = re.escape(f"{dtype}[{','.join(map(str, shape.shape))}]")
    made = re.compile(rf"= \(?{array}.* (copy|copy-start|transpose|fusion|dynamic-update-slice|scatter|broadcast)\(")
    return [line.strip() for line in text.splitlines() if made.search(line)]


def compile_attention(
    generation, H, K, D, N, *, T, S, P, dtype="bfloat16", cache_dtype=None, sinks=False, decode_only=False,
    donated=True, **options,
):  # fmt: skip
    """Returns one layer's compiled step and the shape of its cache."""

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = AttentionBatch(array((S,)), array((S, P)), array((S + 1,)), array((2,)), decode_only=decode_only)
    cache = cache_shape(2000, N, K, D, cache_dtype or dtype, backend="mosaic_tpu")
    q, k, v = (array((T, heads, D), dtype) for heads in (H, K, K))

    def step(q, k, v, cache, batch, sinks):
        return ragged_paged_attention(
            q, k, v, cache, batch, sinks=sinks, scale=D**-0.5, backend="mosaic_tpu", **options
        )

    logits = array((H,), jnp.float32) if sinks else None
    return compile_for(generation, step, q, k, v, cache, batch, logits, donate=(3,) if donated else ()), cache


def vmem_estimate(H, K, D, N, *, T, dtype="bfloat16", cache_dtype=None, decode_only=False, **_) -> int:
    shape = (T, H, Layout(D).key_lanes)
    pages, *_ = cache_shape(2000, N, K, D, cache_dtype or dtype, backend="mosaic_tpu")
    return Blocks.choose(shape, jnp.dtype(dtype), pages, decode=decode_only).vmem_bytes(shape, jnp.dtype(dtype), pages)


def report(generation: str, *, vmem: float = 0.0, **case) -> dict:
    """`vmem`: the limit of vector memory, in estimates; 0 leaves the kernels' own."""
    begin = time.monotonic()
    if vmem:
        jax.clear_caches()  # of traces with another limit
        limit = int(vmem * vmem_estimate(**case))
        kernel.vmem_limit = lambda: limit
    try:
        compiled, cache = compile_attention(generation, **case)
    except jax.errors.JaxRuntimeError as error:
        return {"refused": str(error)[:2000], "seconds": time.monotonic() - begin}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "kernels": sorted(n for n in ("attend_decodes", "attend_prompts", "write_cache") if n in text),
        "copies": [line for array in cache for line in copies_of(text, array)],
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes / sum(x.size * x.dtype.itemsize for x in cache),
        "seconds": time.monotonic() - begin,
    }


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    for case in json.loads(sys.argv[2]):
        print(json.dumps(report(sys.argv[1], **case)), flush=True)
