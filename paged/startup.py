"""From a configuration to an engine that is ready to serve: weights, sizes, pool, programs, in this order."""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import UnsupportedShapeError, attention_backend, is_quantized, lowering
from models import Checkpoint, build_model, make_mesh, open_checkpoint, param_shapes
from paged.compile_process import compile_processes
from paged.compiler import Compiler
from paged.config import EngineConfig, ModelArgs
from paged.errors import InvalidRequestError
from paged.memory import MemoryLedger, ledger, reserve_device_memory, size_pool, unreserved_memory
from paged.packing import buckets
from paged.program_store import ProgramStore
from paged.runner import Runner
from paged.runner_shape import RunnerShape
from paged.sampler import VARIANTS, Variant
from paged.scheduler import Scheduler

logger = logging.getLogger(__name__)


class MachineDefaults(NamedTuple):
    """What the options leave open. Fewer buckets and variants are fewer programs to compile, and more padding."""

    max_num_seqs: int
    max_num_batched_tokens: int
    decode_sizes: tuple[int, ...]  # buckets of S, as far as max_num_seqs goes
    sampling_sizes: tuple[int, ...]  # of rows that are sampled from, likewise
    smallest_prompt: int  # bucket of T
    growth: int  # from a bucket of T to the next
    variants: tuple[Variant, ...]
    chain: int  # decode steps in a call
    block_size: int  # a TPU keeps block tables in scalar memory, so its blocks are larger
    block_size_in_8_bits: int  # the scales of a block of 128 fill a TPU's lanes; a GPU's kernel takes tiles of 64


# "full" alone: what no row of it uses is skipped at run time, at no cost on a CPU; a TPU's compiler is slow, and it
# saves a dozen programs for a few percent of a step. Hopper's tensor cores take 8 rows in the time of 2, its
# linear layers 96 in that of 128, and a head 1 row in that of 8, 16 in that of 32.
ON_CPU, ON_TPU = (1, 4, 16, 64, 256, 1024), (16, 64, 256, 1024)
ON_GPU = (1, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
WIDE_ON_GPU = 4096  # hidden width from which on one row has no bucket, as its products are no faster than those of 8,
# and steps of more than 8 sequences take so long that a call's cost is nothing
SAMPLED_ON_GPU = (8, 32, 64, 128, 256, 512, 1024)
MOST_PROCESSES, CORES_A_PROCESS = 6, 2  # that compile
CONTEXT_BYTES = 1 << 30  # of a GPU's memory for each of them, more than was measured (0.54 GiB on an H100)
DEFAULTS = {
    "cpu": MachineDefaults(16, 512, ON_CPU, ON_CPU, 32, 4, ("full",), 1, 16, 16),
    "gpu": MachineDefaults(256, 8192, ON_GPU, SAMPLED_ON_GPU, 256, 2, VARIANTS, 4, 16, 64),
    "tpu": MachineDefaults(256, 8192, ON_TPU, ON_TPU, 512, 4, ("full",), 1, 64, 128),
}


class Parts(NamedTuple):
    checkpoint: Checkpoint
    runner: Runner
    scheduler: Scheduler
    max_model_len: int
    ledger: MemoryLedger


def open_model(args: ModelArgs) -> Checkpoint:
    """The model, made for the context that is asked for."""
    checkpoint = open_checkpoint(
        args.model,
        tokenizer=args.tokenizer,
        revision=args.revision,
        load_format=args.load_format,
        skip_tokenizer=args.skip_tokenizer_init,
    )
    config = checkpoint.config.for_context(args.max_model_len or 0)
    if config is checkpoint.config:
        return checkpoint
    logger.info("LongRoPE's long factors apply, as max_model_len is %s", f"{args.max_model_len:,}")
    return replace(checkpoint, config=config)


def build(config: EngineConfig) -> Parts:
    """Loads, sizes and compiles.

    Raises:
      InvalidRequestError: an option does not fit the model or the machine; `param` names it.
    """
    begin = time.monotonic()
    args = config.model
    reserve_device_memory(config.cache.gpu_memory_utilization)
    checkpoint = open_model(args)
    backend = attention_backend(config.runner.attention_backend)
    dtype = compute_dtype(args.dtype)
    try:
        mesh = make_mesh(config.runner.tensor_parallel_size)
        model = build_model(
            checkpoint.config,
            dtype=dtype,
            attention_backend=backend,
            mesh=mesh,
            deterministic=config.runner.deterministic,
        )
    except ValueError as e:
        param = "deterministic" if str(e).startswith("deterministic") else "tensor_parallel_size"
        raise InvalidRequestError(str(e), param=param) from e
    checkpoint.check(model)
    with ThreadPoolExecutor(2) as threads:  # while programs are compiled
        weights = threads.submit(checkpoint.load_params, model, dtype, seed=args.seed)
        tokenizer = threads.submit(lambda: checkpoint.tokenizer)  # which keeps it
        try:
            runner, max_model_len = compiled_runner(config, checkpoint, model)
        except InvalidRequestError:
            raise
        except Exception as error:
            if backend == "reference" or config.runner.attention_backend != "auto" or config.runner.deterministic:
                raise
            logger.warning("attention runs through plain XLA, as %s does not compile here: %s", backend, error)
            backend = "reference"
            model = build_model(checkpoint.config, dtype=dtype, attention_backend=backend, mesh=mesh)
            runner, max_model_len = compiled_runner(config, checkpoint, model)
        compiled = time.monotonic()
        params = weights.result()
        tokenizer.result()
    loaded = time.monotonic()
    runner.start(params)
    if jax.default_backend() == "gpu":  # elsewhere the first run of a program is like any other
        runner.warm_up()
    memory = ledger(runner, config.cache)
    logger.info("%s, %s attention, %s", jax.devices()[0].device_kind, backend, jnp.dtype(dtype).name)
    logger.info("memory: %s", memory)
    waited = loaded - compiled
    logger.info("ready in %.1f s, %.1f of them for weights and tokenizer alone", time.monotonic() - begin, waited)
    return Parts(checkpoint, runner, make_scheduler(config, runner.shape), max_model_len, memory)


def compiled_runner(config: EngineConfig, checkpoint: Checkpoint, model: Any) -> tuple[Runner, int]:
    """Sizes the pool and compiles every program; also gives the context length that fits."""
    params = param_shapes(model)
    shape = runner_shape(config, checkpoint, model.compute.dtype, jax.default_backend())
    store = program_store(config.runner.compilation_cache_dir, model, params, shape)
    try:
        count = num_compile_processes(model, store)
        with (
            lowering(model.compute.attention_backend),
            compile_processes(count, model, store) as processes,
            Compiler(store, processes) as compiler,
        ):
            num_blocks = size_pool(model, params, shape, config.cache, compiler)
            shape, max_model_len = fit_context(config, checkpoint, shape, num_blocks)
            runner = Runner(model, params, shape)
            runner.compile(compiler)
            compiler.log()
    except UnsupportedShapeError as e:
        raise InvalidRequestError(str(e)) from e
    return runner, max_model_len


def num_compile_processes(model: Any, store: ProgramStore) -> int:
    """Beside this one. What they compile is handed over in the store, and each has the device's context in memory.
    Without our kernels XLA chooses by time how it computes products, which is better left to one process."""
    compute = model.compute
    if compute.attention_backend != "mosaic_gpu" or compute.shards > 1 or store.directory is None:
        return 0
    contexts = unreserved_memory(jax.devices()[0]) // CONTEXT_BYTES
    return max(0, min(MOST_PROCESSES - 1, (os.cpu_count() or 1) // CORES_A_PROCESS - 1, contexts))


def program_store(cache_dir: str | None, model: Any, params: Any, shape: RunnerShape) -> ProgramStore:
    """Of a model's programs for any size of the pool, which is in their names."""
    mesh = model.compute.mesh
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    weights = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), params)
    sizes = replace(shape, num_blocks=0, blocks_per_seq=0)
    return ProgramStore.of(cache_dir, devices, model.config, model.compute, sizes, weights)


def compute_dtype(name: str) -> jnp.dtype:
    if name != "auto":
        return jnp.dtype(name)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def kv_cache_dtype(name: str, compute: jnp.dtype) -> jnp.dtype:
    names = {"auto": compute, "fp8": jnp.float8_e4m3fn}
    return jnp.dtype(names.get(name, name))


def runner_shape(config: EngineConfig, checkpoint: Checkpoint, dtype: jnp.dtype, platform: str) -> RunnerShape:
    """Every size but the pool's, on a "cpu", "gpu" or "tpu"."""
    defaults = DEFAULTS[platform]
    scheduler, context = config.scheduler, checkpoint.config.max_position_embeddings
    max_model_len = config.model.max_model_len or context
    if max_model_len > context:
        raise InvalidRequestError(f"max_model_len {max_model_len:,} exceeds the model's {context:,}", "max_model_len")
    max_num_seqs = scheduler.max_num_seqs or defaults.max_num_seqs
    max_tokens = scheduler.max_num_batched_tokens or max(max_num_seqs, defaults.max_num_batched_tokens)
    if max_tokens < max_num_seqs:
        raise InvalidRequestError(
            f"max_num_batched_tokens {max_tokens:,} must not be below max_num_seqs {max_num_seqs:,}: every running "
            "sequence needs a token in each step",
            param="max_num_batched_tokens",
        )
    cache_dtype = kv_cache_dtype(config.cache.kv_cache_dtype, dtype)
    default_block_size = defaults.block_size_in_8_bits if is_quantized(cache_dtype) else defaults.block_size
    block_size = config.cache.block_size or default_block_size
    wide = platform == "gpu" and checkpoint.config.hidden_size >= WIDE_ON_GPU
    return RunnerShape(
        num_blocks=0,
        block_size=block_size,
        blocks_per_seq=-(-max_model_len // block_size),
        max_num_seqs=max_num_seqs,
        vocab_size=checkpoint.config.vocab_size,
        max_logprobs=scheduler.max_logprobs,
        decode_sizes=up_to(defaults.decode_sizes[wide:], max_num_seqs),
        sampling_sizes=up_to(defaults.sampling_sizes, max_num_seqs),
        prompt_sizes=prompt_sizes(max_tokens, defaults, platform),
        variants=defaults.variants,
        cache_dtype=cache_dtype,
        chain=defaults.chain,
        largest_chained=8 if wide else 32,
    )


def prompt_sizes(largest: int, defaults: MachineDefaults, platform: str) -> tuple[int, ...]:
    """Buckets of T. A GPU, which compiles fast, has one more below the largest, where padding would cost the most."""
    sizes = buckets(defaults.smallest_prompt, largest, defaults.growth)
    middle = largest * 3 // 4
    if platform != "gpu" or middle <= max((defaults.smallest_prompt, *sizes[:-1])):
        return sizes
    return (*sizes[:-1], middle, largest)


def up_to(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """Those below it, and it."""
    return (*[size for size in sizes if size < largest], largest)


def fit_context(
    config: EngineConfig, checkpoint: Checkpoint, shape: RunnerShape, num_blocks: int
) -> tuple[RunnerShape, int]:
    """The final shape, and the context length that the pool can hold. A context nobody asked for shrinks to fit."""
    asked = config.model.max_model_len
    max_model_len = asked or checkpoint.config.max_position_embeddings
    room = (num_blocks - 1) * shape.block_size
    if room < max_model_len:
        if asked or num_blocks < 2:
            raise InvalidRequestError(
                f"the KV cache has room for {max(0, room):,} tokens, and max_model_len is {max_model_len:,}: lower "
                "max_model_len or max_num_batched_tokens, or raise gpu_memory_utilization or kv_cache_memory_bytes",
                param="max_model_len",
            )
        logger.warning("the context is cut from %s to %s tokens, which is what the KV cache holds", max_model_len, room)
        max_model_len = room
    blocks_per_seq = -(-max_model_len // shape.block_size)
    return replace(shape, num_blocks=num_blocks, blocks_per_seq=blocks_per_seq), max_model_len


def make_scheduler(config: EngineConfig, shape: RunnerShape) -> Scheduler:
    return Scheduler(
        num_blocks=shape.num_blocks,
        block_size=shape.block_size,
        max_num_seqs=shape.max_num_seqs,
        max_num_batched_tokens=shape.prompt_sizes[-1],
        max_num_queued_requests=config.scheduler.max_num_queued_requests,
        max_num_queued_tokens=config.scheduler.max_num_queued_tokens,
        policy=config.scheduler.scheduling_policy,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
