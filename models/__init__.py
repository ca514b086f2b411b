"""Models by family, their configuration, and the checkpoints they are read from."""

from models.checkpoint import Checkpoint, open_checkpoint
from models.config import ModelConfig, RopeScaling
from models.registry import build_model, head_params, param_shapes
from models.sharding import CACHE, make_mesh, sharded

__all__ = [
    "CACHE",
    "Checkpoint",
    "ModelConfig",
    "RopeScaling",
    "build_model",
    "head_params",
    "make_mesh",
    "open_checkpoint",
    "param_shapes",
    "sharded",
]
