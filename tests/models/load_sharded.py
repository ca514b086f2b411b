"""Fixtures on two devices, beside one: python -m tests.models.load_sharded FOLDER prints what differs, as JSON."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from models import build_model, make_mesh, open_checkpoint
from models.sharding import in_device_order, placement

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("qwen2", "phi3", "gpt2", "mixtral")  # biases; fused in the checkpoint; transposed; experts


def load(path: Path, devices: int) -> tuple:
    checkpoint = open_checkpoint(str(path), skip_tokenizer=True)
    mesh = make_mesh(devices)
    model = build_model(checkpoint.config, dtype="float32", attention_backend="reference", mesh=mesh)
    params = checkpoint.load_params(model, jnp.dtype("float32"), progress=False)
    return checkpoint.config, flatten_dict(params["params"])


def differences(path: Path, source: Path) -> list[str]:
    """Of parameters at `path` on two devices from those at `source` on one; and what is not split as it should be."""
    config, one = load(source, 1)
    _, two = load(path, 2)
    wrong = []
    for name, leaf in two.items():
        where = placement(name, leaf.shape, config)
        if not np.array_equal(leaf, in_device_order(one[name], where, 2)):
            wrong.append(f"{path.name} {name}: values")
        shard = list(leaf.shape)
        if where.axis is not None:
            shard[where.axis] //= 2
        if any(list(s.data.shape) != shard for s in leaf.addressable_shards):
            wrong.append(f"{path.name} {name}: split")
    return wrong


def main(folder: Path) -> None:
    from models.orbax_checkpoint import write_checkpoint

    wrong = [line for name in NAMES for line in differences(FIXTURES / name, FIXTURES / name)]
    checkpoint = open_checkpoint(str(FIXTURES / "qwen2"), skip_tokenizer=True)
    model = build_model(checkpoint.config, dtype="float32", attention_backend="reference")
    params = checkpoint.load_params(model, jnp.dtype("float32"), progress=False)
    write_checkpoint(folder / "orbax", checkpoint.config, params, generation_config={})
    print(json.dumps(wrong + differences(folder / "orbax", FIXTURES / "qwen2")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
