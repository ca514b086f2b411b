"""Models by family, their configuration, and the checkpoints they are read from."""

from models.checkpoint import Checkpoint, open_checkpoint
from models.config import ModelConfig, RopeScaling
from models.registry import build_model, param_shapes

__all__ = ["Checkpoint", "ModelConfig", "RopeScaling", "build_model", "open_checkpoint", "param_shapes"]
