"""A tiny random model for tests of the engine: real code, real sampling, compiled in seconds."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import AttentionBatch
from paged.config import EngineConfig
from paged.engine import Engine
from paged.outputs import CompletionDelta

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128, "block_size": 8, "dtype": "float32"}


def write_config(folder: Path, **fields) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    return str(folder)


def make_engine(folder: str, listeners=(), **options) -> Engine:
    options = SMALL | {"model": folder, "load_format": "dummy", "num_gpu_blocks_override": 80} | options
    return Engine(EngineConfig.from_kwargs(**options), listeners)


def run(engine: Engine, requests: dict, **options) -> dict[str, list[CompletionDelta]]:
    """requests: id -> (prompt token ids, SamplingParams). Everything at once, to the end."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params, **options)
    deltas: dict[str, list[CompletionDelta]] = {request_id: [] for request_id in requests}
    for _ in range(10_000):
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
        if not engine.has_unfinished_requests():
            return deltas
    raise AssertionError("the engine does not finish")


def tokens(deltas: list[CompletionDelta], index: int = 0) -> list[int]:
    return [t for d in deltas if d.index == index for t in d.token_ids]


def logits_of(engine: Engine, token_ids: list[int]) -> np.ndarray:
    """float32[len, V]: one uncached forward pass over the whole sequence, without the scheduler or the runner."""
    runner = engine.runner
    n, size = len(token_ids), 128
    blocks = -(-size // runner.shape.block_size)

    @cache
    def forward():
        def apply(params, ids, length):
            caches = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype),
                runner.model.cache_shapes(blocks + 1, runner.shape.block_size, runner.shape.cache_dtype),
            )
            table = jnp.arange(1, blocks + 1, dtype=jnp.int32)[None]
            batch = AttentionBatch(
                length[None], table, jnp.stack([jnp.int32(0), length]), jnp.asarray([0, 1], jnp.int32)
            )
            hidden, _ = runner.model.apply(params, ids, jnp.arange(size), caches, batch)
            return runner.model.apply(params, hidden, method="logits")

        return jax.jit(apply)

    ids = np.zeros(size, np.int32)
    ids[:n] = token_ids
    return np.asarray(forward()(runner.params, ids, jnp.int32(n)))[:n]
