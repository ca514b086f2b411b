"""How the cache lies in a TPU's memory, and the block sizes of the kernels over it.

One layer's cache has pages [B, K, N, L]: a page holds keys and values of all heads, and a row of L lanes holds one
token's key beside its value, so that one DMA of contiguous memory fetches a page and a head's rows fill whole tiles.
Heads of up to 64 share a register's 128 lanes between key and value; wider ones get multiples of 128 lanes each.
In eight bits the cache has scales too, float32[B, K, 2, N], of keys and of values: a page's tokens lie along the lanes,
as they do in the scores that the scales multiply, and as pages are of N = 128, they fill them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import UnsupportedShapeError
from kernels_pallas.quantize import SCALE_DTYPE, is_quantized

LANES = 128  # of a vector register
SMALLEST_VMEM = 64 << 20  # bytes, of a v5p: the least that a generation served here has
LARGEST_VMEM_LIMIT = 48 << 20  # bytes: larger blocks than these need would gain nothing
SMEM_LIMIT = 960 << 10  # bytes of block tables and lengths, of the 1 MiB of scalar memory
STAGES = 4  # key/value buffers: one in use, the others on their way
CHUNK_BYTES = 1 << 20  # of keys and values fetched at a time: 3 on their way cover the latency of HBM
DECODES_PER_TILE = 8
PROMPT_ROWS = 512  # query rows of one head group that share a pass over a chunk


@dataclass(frozen=True)
class Layout:
    """What the head size decides.

    Attributes:
      key_lanes: lanes of a query that meets a row of the cache; zeros from head_dim on.
      value_start: first lane of the values in a row.
      value_lanes: lanes of a row that are weighted and summed, from `row_lanes - value_lanes` on.
    """

    head_dim: int

    @property
    def packed(self) -> bool:
        return self.head_dim <= LANES // 2

    @property
    def row_lanes(self) -> int:
        return LANES if self.packed else 2 * self.key_lanes

    @property
    def key_lanes(self) -> int:
        return _round_up(self.head_dim, LANES)

    @property
    def value_start(self) -> int:
        return self.row_lanes // 2

    @property
    def value_lanes(self) -> int:
        return self.key_lanes


def sublanes(dtype) -> int:
    """Rows of a tile of `dtype`: 8 of float32, 16 of bfloat16, 32 of eight bits."""
    return 32 // jnp.dtype(dtype).itemsize


def cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Pages, and scales in eight bits. Raises UnsupportedShapeError where a block does not fill tiles."""
    rows = LANES if is_quantized(dtype) else sublanes(dtype)
    if block_size % rows:
        raise UnsupportedShapeError(
            f"block_size must be a multiple of {rows} for a TPU's {jnp.dtype(dtype).name} cache, not {block_size}"
        )
    pages = jax.ShapeDtypeStruct((num_blocks, num_kv_heads, block_size, Layout(head_dim).row_lanes), dtype)
    scales = jax.ShapeDtypeStruct((num_blocks, num_kv_heads, 2, block_size), SCALE_DTYPE)
    return (pages, scales) if is_quantized(dtype) else (pages,)


def vmem_limit() -> int:
    """Bytes of vector memory that a kernel may use: three quarters of the chip's, up to LARGEST_VMEM_LIMIT. Where the
    device is no TPU (the interpreter, or a compilation that does not say for which chip), of the smallest."""
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = SMALLEST_VMEM
    return min(capacity * 3 // 4, LARGEST_VMEM_LIMIT)


def keep_in_hbm(cache: jax.Array) -> jax.Array:
    """For a kernel's operand: XLA would move an array that fits to VMEM and back, whole, around each kernel."""
    return pltpu.with_memory_space_constraint(cache, pltpu.HBM)


def pack_rows(k: jax.Array, v: jax.Array, dtype) -> jax.Array:
    """k, v [T, K, D] -> rows of the cache, [T, K, L]."""
    layout = Layout(k.shape[-1])
    half = layout.row_lanes // 2
    return jnp.concatenate([_pad_lanes(k, half), _pad_lanes(v, half)], axis=-1).astype(dtype)


def pad_queries(q: jax.Array) -> jax.Array:
    """[..., D] -> [..., key_lanes]. Under a packed layout the zeros meet the values and add nothing."""
    return _pad_lanes(q, Layout(q.shape[-1]).key_lanes)


def unpack_output(out: jax.Array, head_dim: int) -> jax.Array:
    """[..., value_lanes] -> [..., D]."""
    start = Layout(head_dim).value_start if Layout(head_dim).packed else 0
    return out[..., start : start + head_dim]


@dataclass(frozen=True)
class Blocks:
    """The sizes of one attention kernel.

    Attributes:
      tile: query tokens of a grid step; for decodes, sequences.
      chunk: cached tokens of one buffer, a whole number of pages and of LANES.
      decode: every token of a tile is a sequence of its own.
    """

    tile: int
    chunk: int
    decode: bool

    @classmethod
    def choose(cls, q_shape: tuple[int, int, int], dtype, pages: jax.ShapeDtypeStruct, *, decode: bool) -> "Blocks":
        """The largest that fit half of vmem_limit() (the rest is the compiler's own temporaries): chunks of about
        CHUNK_BYTES, tiles of about PROMPT_ROWS rows a head group.

        q_shape: [T, H, key_lanes]. Tiles shrink first, as a chunk must be large enough for HBM's latency.
        """
        T, H, _ = q_shape
        _, K, N, L = pages.shape
        token_bytes = K * L * jnp.dtype(pages.dtype).itemsize
        unit = max(LANES, N)
        chunk = max(unit, min(512, CHUNK_BYTES // token_bytes) // unit * unit)
        if decode:
            tile = min(T, DECODES_PER_TILE)
        else:
            tile = min(_power_of_two_up(T), max(16, _power_of_two(PROMPT_ROWS // (H // K))), 256)
        blocks = cls(max(tile, 1 if decode else 16), chunk, decode)
        while blocks.vmem_bytes(q_shape, dtype, pages) > vmem_limit() // 2:
            if not decode and blocks.tile > 16:
                blocks = cls(blocks.tile // 2, blocks.chunk, decode)
            elif blocks.chunk > unit:
                blocks = cls(blocks.tile, _round_up(blocks.chunk // 2, unit), decode)
            else:
                break
        return blocks

    def heads_at_once(self, K: int) -> int:
        """Heads whose scores are computed before any is summed: a decode's are few, and the heads' long chains of
        operations then overlap (on a v6e 474 instructions a chunk of Llama-3.1-8B instead of 688)."""
        return K if self.decode else 1

    def vmem_bytes(self, q_shape: tuple[int, int, int], dtype, pages: jax.ShapeDtypeStruct) -> int:
        """Bytes of VMEM that the kernel's buffers take, and an allowance for scores.

        Queries and outputs are double-buffered by the pipeline; rows are padded to whole tiles.
        """
        _, H, W = q_shape
        _, K, _, L = pages.shape
        G, itemsize = H // K, jnp.dtype(dtype).itemsize
        rows = _round_up(G, 8) if self.decode else G * self.tile
        block_rows = self.tile * _round_up(G, sublanes(dtype)) if self.decode else rows
        queries_and_outputs = 2 * 2 * K * block_rows * W * itemsize
        scales = 2 * jnp.dtype(SCALE_DTYPE).itemsize if is_quantized(pages.dtype) else 0
        keys_and_values = STAGES * self.chunk * K * (L * jnp.dtype(pages.dtype).itemsize + scales)
        sums = K * rows * (2 * LANES + W) * 4
        scores = (2 + self.heads_at_once(K)) * rows * self.chunk * 4 + 2 * self.chunk * L * itemsize
        return queries_and_outputs + keys_and_values + sums + scores


def _pad_lanes(x: jax.Array, lanes: int) -> jax.Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, lanes - x.shape[-1]),))


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _power_of_two(x: int) -> int:
    """The largest that is not above x."""
    return 1 << (max(1, x).bit_length() - 1)


def _power_of_two_up(x: int) -> int:
    return 1 << (x - 1).bit_length()
