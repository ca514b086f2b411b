"""Which of several workers is the last to be done with what they have in parts.

A worker that has stored its part adds it to a number in device memory. Who brings that to the total knows that all
parts are there to be read, does what is to be done once, and leaves zero for the next kernel.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from kernels_pallas.gpu.rows import SCALAR


def add_to(count, told, value):
    """Adds to count, an int32[1] in device memory, once all threads of the warpgroup have come here; gives all of them
    the sum. told: int32[1] in shared memory, of this warpgroup.

    What the warpgroup has stored before is seen by whoever finds it in the sum: the addition is a release and an
    acquire (PTX ISA 9, memory consistency model), and so for all threads, as barriers are around it.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    def add(_, count, told, value):
        i32, first = ir.IntegerType.get_signless(32), [mgpu.c(0, ir.IndexType.get())]
        value = value.registers.item()
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(mgpu.ThreadSubset.WARPGROUP):
            text = "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;"
            found = mgpu.inline_ptx(text, mgpu.memref_ptr(count), value, result_types=i32, has_side_effects=True)
            memref.store(arith.addi(found, value), told, first)
        mgpu.warpgroup_barrier()
        return FragmentedArray.splat(memref.load(told, first), (), is_signed=True)

    return add(count, told, jnp.asarray(value, jnp.int32))
