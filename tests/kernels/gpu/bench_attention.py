"""Times the attention kernels: python -m tests.kernels.gpu.bench_attention [decode] [projected] [prefill]

Each line is one shape. Calls are chained, the output of one being the queries of the next, over enough caches that
none is still in the L2, and compiled as one program, as the layers of a model are.
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import attention_mgpu

from kernels_pallas import is_quantized, vector_bytes
from kernels_pallas.gpu import decode, prefill
from kernels_pallas.gpu.decode_eight_bits import decode_eight_bits
from tests.kernels.gpu import paged

COPY_BANDWIDTH = 2.95e12  # bytes a second, read and written, of a device copy on an H100
MATMUL_PEAK = 740e12  # measured with XLA, bfloat16
L2 = 50e6


def seconds(step, *args, calls, repeats=5, programs=20):
    """Median time of one of the `calls` chained in step."""
    jax.block_until_ready(step(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(programs):
            out = step(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / programs / calls)
    return float(np.median(times))


def make_caches(S, length, *, K, D, N, dtype, calls):
    """int32[S], block tables, so many layers' caches that none is still in the L2 when it is used again, and the bytes
    that a layer reads."""
    lens = np.broadcast_to(np.asarray(length), (S,))
    size = int(lens.sum()) * K * 2 * vector_bytes(D, dtype)
    layers = int(np.clip(-(-6 * L2 // size), 2, calls))
    tables, caches = paged.pool(jax.random.key(0), lens, K=K, D=D, N=N, dtype=dtype, layers=layers)
    return jnp.asarray(lens, jnp.int32), tables, caches, size


def time_decode(S, length, *, H, K, D, N=64, cache_dtype=jnp.bfloat16, calls=32, config=None, **options):
    kv_lens, tables, caches, size = make_caches(S, length, K=K, D=D, N=N, dtype=cache_dtype, calls=calls)
    q = jax.random.normal(jax.random.key(1), (S, H, D), jnp.bfloat16)
    options |= {"scale": D**-0.5}

    def attend(q, cache, kv_lens, tables):
        if is_quantized(cache_dtype):
            return decode_eight_bits(q, cache, kv_lens, tables, config=config, **options)
        return decode.decode_attention(q, *cache, kv_lens, tables, config=config, **options)

    @jax.jit
    def step(q, caches, kv_lens, tables):
        for i in range(calls):
            q = attend(q, caches[i % len(caches)], kv_lens, tables)
        return q

    out = attend(q, caches[0], kv_lens, tables)
    few = slice(0, 8)
    wrong = paged.error(out[few], paged.expected_decode(q[few], caches[0], kv_lens[few], tables[few], **options))
    taken = seconds(step, q, caches, kv_lens, tables, calls=calls)
    return taken, size / COPY_BANDWIDTH, wrong


def projected_step(q, parts, caches, tables, kv_lens, block_tables, *, calls, norms, num_heads, scale):
    """`calls` layers' attention from the projection, which has the output of the one before among its queries."""
    for i in range(calls):
        parts = parts.at[0, :, :num_heads].set(q)
        q, caches[i % len(caches)] = decode.decode_projected(
            parts, tables, norms, caches[i % len(caches)], kv_lens, block_tables,
            num_heads=num_heads, epsilon=1e-6, norm_offset=0.0, scale=scale,
        )  # fmt: skip
    return q, caches


def time_projected(S, length, *, H, K, D, norms, N=16, calls=32):
    """As an engine runs it: with the newest token's norms, rotary embedding and write. Also XLA's copies of what was
    projected are in it."""
    kv_lens, block_tables, caches, size = make_caches(S, length, K=K, D=D, N=N, dtype=jnp.bfloat16, calls=calls)
    q, parts = (jax.random.normal(jax.random.key(1), (*s, D), jnp.bfloat16) for s in ((S, H), (1, S, H + 2 * K)))
    tables, weights = (jnp.ones((S, D // 2)),) * 2, (jnp.ones(D, jnp.bfloat16),) * 2 if norms else None
    options = {"calls": calls, "norms": weights, "num_heads": H, "scale": D**-0.5}
    step, state = jax.jit(partial(projected_step, **options), donate_argnums=2), list(caches)

    def run():
        nonlocal state
        out, state = step(q, parts, state, tables, kv_lens, block_tables)
        return out

    return seconds(run, calls=calls), size / COPY_BANDWIDTH


LLAMA = {"H": 32, "K": 8, "D": 128}
QWEN = {"H": 16, "K": 8, "D": 128}
CACHES = ["bfloat16", "int8", "float8_e4m3fn"]
BATCHES = [(64, 4096), (256, 1024), (64, 1024), (32, 1024), (17, 1024), (8, 1024), (1, 32768), (1, 1024), (256, 128)]


def decode_table():
    for name, heads in (("llama", LLAMA), ("qwen3-0.6b", QWEN)):
        for S, length in BATCHES:
            for dtype in CACHES:
                taken, floor, wrong = time_decode(S, length, cache_dtype=dtype, **heads)
                ours, best = f"{taken * 1e6:8.1f} us", f"{floor * 1e6:7.1f}"
                print(
                    f"{name:11} {dtype:13} {S:4} x {length:6}: {ours}, floor {best}, {floor / taken:6.1%}, "
                    f"error {wrong:.4f}",
                    flush=True,
                )


def projected_table():
    for name, heads in (("llama", LLAMA | {"norms": False}), ("qwen3-0.6b", QWEN | {"norms": True})):
        for S, length in BATCHES:
            taken, floor = time_projected(S, length, **heads)
            print(
                f"{name:11} {S:4} x {length:6}: {taken * 1e6:8.1f} us, floor {floor * 1e6:7.1f}, {floor / taken:6.1%}"
            )


def time_prefill(lengths, cached=0, *, H, K, D, N=64, cache_dtype=jnp.bfloat16, calls=8, config=None, **options):
    new = np.asarray(lengths)
    tables, (cache,) = paged.pool(jax.random.key(0), cached + new, K=K, D=D, N=N, dtype=cache_dtype)
    cu_q_lens = jnp.asarray(np.append(0, np.cumsum(new)), jnp.int32)
    q = jax.random.normal(jax.random.key(1), (-(-int(new.sum()) // 8) * 8, H, D), jnp.bfloat16)
    attend = partial(prefill.prefill_attention, scale=D**-0.5, config=config, **options)

    @jax.jit
    def step(q, cache, kv_lens, tables, cu_q_lens, num_seqs):
        for _ in range(calls):
            q = attend(q, cache, kv_lens, tables, cu_q_lens, num_seqs)
        return q

    args = jnp.asarray(cached + new, jnp.int32), tables, cu_q_lens, jnp.asarray([0, len(new)], jnp.int32)
    taken = seconds(step, q, cache, *args, calls=calls, programs=5)
    return taken, 4 * D * H * float(np.sum(new * cached + new * (new + 1) / 2))


def time_dense(S, length, *, H, K, D, calls=8):
    """The dense causal kernel that ships in jax, on equal shapes."""
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    q, k, v = (jax.random.normal(jax.random.key(i), (S, length, h, D), jnp.float16) for i, h in enumerate((H, K, K)))

    @jax.jit
    def step(q, k, v):
        for _ in range(calls):
            q = attention_mgpu.attention(q, k, v, config)
        return q

    return seconds(step, q, k, v, calls=calls, programs=5)


MIX = np.random.default_rng(7).integers(50, 800, 20)
PROMPTS = {  # lengths, tokens cached before each, window
    "1 x 8,192": ([8192], 0, None),
    "4 x 2,048": ([2048] * 4, 0, None),
    "16 x 512": ([512] * 16, 0, None),
    "64 x 128": ([128] * 64, 0, None),
    "20 of 50 to 800": (MIX, 0, None),
    "1 x 2,048": ([2048], 0, None),
    "1 x 2,048 after 30,720": ([2048], 30720, None),
    "4 x 2,048, window of 1,024": ([2048] * 4, 0, 1024),
}


def prefill_table(configs=(None,)):
    for name, heads in (("llama", LLAMA), ("qwen3-0.6b", QWEN)):
        for shape, (lengths, cached, window) in PROMPTS.items():
            S, longest = len(lengths), max(lengths)
            equal = not cached and not window and min(lengths) == longest >= 256
            dense = f", dense {time_dense(S, longest, **heads) * 1e6:7.1f} us" if equal else ""
            for config in configs:
                for N, dtype in ((16, "bfloat16"), *((64, dtype) for dtype in CACHES)):
                    taken, flops = time_prefill(
                        lengths, cached, N=N, cache_dtype=dtype, config=config, window=window, **heads
                    )
                    rate = (
                        "" if window else f", {flops / taken / 1e12:5.0f} TFLOP/s, {flops / taken / MATMUL_PEAK:5.1%}"
                    )
                    which = f"{name:11} {shape:26} {dtype:13} blocks of {N:2} {config or ''}"
                    print(f"{which}: {taken * 1e6:7.1f} us{rate}{dense}", flush=True)


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, jax.__version__)
    if "decode" in sys.argv:
        decode_table()
    if "projected" in sys.argv:
        projected_table()
    if "prefill" in sys.argv:
        prefill_table()
