"""Where parameters go, and in which order they get there."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.sharding import Placement, check_divides, in_device_order, unfuse


def test_a_split_of_fused_rows_is_a_slice() -> None:
    parts = (8, 4, 4)
    kernel = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    ordered = np.asarray(in_device_order(jnp.asarray(kernel), Placement(0, parts, (1, 1, 1)), 2))
    q, k, v = np.split(kernel, [8, 12])
    np.testing.assert_array_equal(ordered[:8], np.concatenate([q[:4], k[:2], v[:2]]))
    np.testing.assert_array_equal(ordered[8:], np.concatenate([q[4:], k[2:], v[2:]]))
    x = np.random.default_rng(0).integers(-3, 3, (5, 3)).astype(np.float32)
    for got, part in zip(unfuse(jnp.asarray(x @ ordered.T), parts, 2), (q, k, v), strict=True):
        np.testing.assert_array_equal(got, x @ part.T)


def test_a_kv_head_lies_on_as_many_neighbours_as_it_takes() -> None:
    """2 KV heads of one row over 4 devices, which have 2 of the 8 query heads each: those of their KV head."""
    kernel = np.array([[10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 30, 31]]).T
    where = Placement(0, (8, 2, 2), (1, 2, 2))
    ordered = np.asarray(in_device_order(jnp.asarray(kernel), where, 4))
    np.testing.assert_array_equal(
        ordered.reshape(4, -1), [[10, 11, 20, 30], [12, 13, 20, 30], [14, 15, 21, 31], [16, 17, 21, 31]]
    )
    assert where.on_devices(kernel.shape) == ordered.shape
    assert where.stored(ordered.shape) == kernel.shape


SIZES = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 48, "num_layers": 1, "num_heads": 24,
         "num_kv_heads": 8, "head_dim": 4, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 24])
def test_sizes_that_divide(shards: int) -> None:
    check_divides(ModelConfig(architecture="LlamaForCausalLM", **SIZES), shards)


@pytest.mark.parametrize(
    ("shards", "other", "message"),
    [
        (
            3,
            {},
            "tensor_parallel_size 3 neither divides the model's KV heads of 8 nor is a multiple of them; what does: 2",
        ),
        (12, {}, "12 neither divides the model's KV heads of 8 nor is a multiple of them; what does: 2, 4, 8"),
        (16, {}, "16 does not divide the model's query heads of 24; what does: 2, 4, 8"),
        (8, {"vocab_size": 97}, "8 does not divide the model's vocabulary of 97"),
        (8, {"intermediate_size": 50}, "8 does not divide the model's intermediate size of 50; what does: 2"),
    ],
)
def test_sizes_that_do_not_divide_are_named(shards: int, other: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_divides(ModelConfig(architecture="LlamaForCausalLM", **SIZES | other), shards)


@pytest.mark.skipif(find_spec("orbax") is None, reason="needs orbax-checkpoint")
def test_checkpoints_load_onto_several_devices(tmp_path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.models.load_sharded", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
