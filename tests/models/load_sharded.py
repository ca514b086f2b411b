"""Fixtures on 2 and 4 devices, beside one: python -m tests.models.load_sharded FOLDER prints what differs, as JSON.

They have 4 query heads and, but for gpt2, 2 KV heads: on 4 devices each KV head lies on two.
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from models import build_model, make_mesh, open_checkpoint
from models.sharding import in_device_order, placement

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = (
    "qwen2",
    "phi3",
    "gpt2",
    "mixtral",
    "olmo2",
)  # biases; fused in the checkpoint; transposed; experts; wide norms
SIZES = (2, 4)


def load(path: Path, devices: int) -> tuple:
    checkpoint = open_checkpoint(str(path), skip_tokenizer=True)
    mesh = make_mesh(devices)
    model = build_model(checkpoint.config, dtype="float32", attention_backend="reference", mesh=mesh)
    params = checkpoint.load_params(model, jnp.dtype("float32"), progress=False)
    return checkpoint.config, flatten_dict(params["params"])


def differences(path: Path, source: Path, devices: int) -> list[str]:
    """Of parameters at `path` on so many devices from those at `source` on one; and what is not split as it should."""
    config, one = load(source, 1)
    _, several = load(path, devices)
    wrong = []
    for name, leaf in several.items():
        where = placement(name, leaf.shape, config, devices)
        if not np.array_equal(leaf, in_device_order(one[name], where, devices)):
            wrong.append(f"{path.name} on {devices}, {name}: values")
        shard = list(leaf.shape)
        if where.axis is not None:
            shard[where.axis] //= devices
        if any(list(s.data.shape) != shard for s in leaf.addressable_shards):
            wrong.append(f"{path.name} on {devices}, {name}: split")
    return wrong


def main(folder: Path) -> None:
    from models.orbax_checkpoint import write_checkpoint

    checkpoint = open_checkpoint(str(FIXTURES / "qwen2"), skip_tokenizer=True)
    model = build_model(checkpoint.config, dtype="float32", attention_backend="reference")
    params = checkpoint.load_params(model, jnp.dtype("float32"), progress=False)
    write_checkpoint(folder / "orbax", checkpoint.config, params, generation_config={})
    pairs = [(FIXTURES / name, FIXTURES / name) for name in NAMES] + [(folder / "orbax", FIXTURES / "qwen2")]
    print(json.dumps([line for size in SIZES for pair in pairs for line in differences(*pair, size)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
