"""Ragged paged attention on TPU: writes the step's keys and values, then decodes and prompts each in a kernel call."""

import jax.numpy as jnp

from kernels_pallas.attention import UnsupportedShapeError
from kernels_pallas.tpu import layout
from kernels_pallas.tpu.fetch import Batch
from kernels_pallas.tpu.kernel import Options, attend
from kernels_pallas.tpu.layout import Blocks, Layout, cache_shape
from kernels_pallas.tpu.write import write_cache

__all__ = ["cache_shape", "ragged_paged_attention"]


def ragged_paged_attention(q, k, v, cache, batch, *, scale, window, soft_cap, sinks):
    """See kernels_pallas.attention."""
    T, H, D = q.shape
    K = k.shape[1]
    _check_scalar_memory(batch)
    cache = write_cache(k, v, cache, batch)
    heads = Layout(D)
    options = Options(scale, window, soft_cap, 0 if heads.packed else heads.value_start)
    queries = layout.pad_queries(q).reshape(T, K, H // K, heads.key_lanes)
    if sinks is not None:
        sinks = sinks.reshape(K, H // K)

    def run(queries, first, end, *, decode):
        blocks = Blocks.choose((T, H, heads.key_lanes), q.dtype, cache[0], decode=decode)
        seqs = jnp.stack([first, end]).astype(jnp.int32)
        scalars = Batch(seqs, batch.kv_lens, batch.block_tables.reshape(-1), batch.cu_q_lens)
        return attend(scalars, queries, cache, sinks, options=options, blocks=blocks)

    num_decodes, num_seqs = batch.num_seqs[0], batch.num_seqs[1]
    if batch.decode_only:
        out = run(queries, jnp.zeros_like(num_seqs), num_seqs, decode=True)
    else:
        prompts = run(queries.transpose(1, 2, 0, 3), num_decodes, num_seqs, decode=False)
        prompts = prompts.reshape(H, T, -1).transpose(1, 0, 2)  # in whole tiles of heads, which G alone would not fill
        rows = min(T, len(batch.kv_lens))  # a decode's only token is in the row of its sequence
        decodes = run(queries[:rows], jnp.zeros_like(num_decodes), num_decodes, decode=True).reshape(rows, H, -1)
        is_decode = (jnp.arange(rows) < num_decodes)[:, None, None]
        out = prompts.at[:rows].set(jnp.where(is_decode, decodes, prompts[:rows]))
    return layout.unpack_output(out.reshape(T, H, -1), D), cache


def _check_scalar_memory(batch) -> None:
    S, P = batch.block_tables.shape
    needed = (S * P + 2 * S) * 4
    if needed > layout.SMEM_LIMIT:
        raise UnsupportedShapeError(
            f"block tables of {S} sequences x {P} blocks take {needed >> 10:,} KiB, and a TPU's scalar memory has room "
            f"for {layout.SMEM_LIMIT >> 10}: lower max_num_seqs or max_model_len, or raise block_size"
        )
