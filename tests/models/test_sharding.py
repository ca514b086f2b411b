"""Where parameters go, and in which order they get there."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

from models.sharding import Placement, in_device_order, unfuse


def test_a_split_of_fused_rows_is_a_slice() -> None:
    parts = (8, 4, 4)
    kernel = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    ordered = np.asarray(in_device_order(jnp.asarray(kernel), Placement(0, parts), 2))
    q, k, v = np.split(kernel, [8, 12])
    np.testing.assert_array_equal(ordered[:8], np.concatenate([q[:4], k[:2], v[:2]]))
    np.testing.assert_array_equal(ordered[8:], np.concatenate([q[4:], k[2:], v[2:]]))
    x = np.random.default_rng(0).integers(-3, 3, (5, 3)).astype(np.float32)
    for got, part in zip(unfuse(jnp.asarray(x @ ordered.T), parts, 2), (q, k, v), strict=True):
        np.testing.assert_array_equal(got, x @ part.T)


@pytest.mark.skipif(find_spec("orbax") is None, reason="needs orbax-checkpoint")
def test_checkpoints_load_onto_two_devices(tmp_path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "tests.models.load_sharded", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
