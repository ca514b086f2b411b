"""Models by family, their configuration, and the checkpoints they are read from."""

from models.config import ModelConfig, RopeScaling
from models.registry import build_model, param_shapes

__all__ = ["ModelConfig", "RopeScaling", "build_model", "param_shapes"]
