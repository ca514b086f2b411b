"""Models by family, their configuration, and the checkpoints they are read from."""

from models.checkpoint import Checkpoint, open_checkpoint
from models.config import ModelConfig, RopeScaling
from models.layers import begin_stream, settled
from models.registry import build_model, head_params, param_shapes
from models.sharding import CACHE, make_mesh, sharded

__all__ = [
    "CACHE",
    "Checkpoint",
    "ModelConfig",
    "RopeScaling",
    "begin_stream",
    "build_model",
    "head_params",
    "make_mesh",
    "open_checkpoint",
    "param_shapes",
    "settled",
    "sharded",
]
