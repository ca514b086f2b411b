"""DeepSeek's tensors as models.deepseek wants them."""

import numpy as np

from models.config import ModelConfig
from models.expert_tensors import ExpertTensors
from models.parts import TensorSource

_OF_A_PREDICTOR = "eh_proj.weight"  # of the layers that predict further tokens (arXiv 2412.19437, 2.2) alone


class LatentTensors:
    """A TensorSource: `source` with each expert under its own name (models.expert_tensors), the layers that predict
    further tokens left out, the rotary rows of queries and keys put from interleaved pairs (0, 1), (2, 3), ... into
    halves, and `kv_b_proj` [H * (C + V), R] cut into `k_b_proj` [H, C, R] and `v_b_proj` [H, V, R].
    """

    def __init__(self, source: TensorSource, config: ModelConfig):
        assert config.latent is not None and config.experts is not None
        self._source = ExpertTensors(source, config.experts.count)
        self._config, self._latent = config, config.latent
        predictors = tuple(
            name.removesuffix(_OF_A_PREDICTOR) for name in source.names if name.endswith(_OF_A_PREDICTOR)
        )
        self._stored_as = {
            name.replace("kv_b_proj", cut): name
            for name in self._source.names
            for cut in ("k_b_proj", "v_b_proj")
            if not name.startswith(predictors)
        }

    @property
    def names(self) -> list[str]:
        return list(self._stored_as)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        tensor = self._source.read(self._stored_as[name], out)
        latent = self._latent
        match name.split(".")[-2]:
            case "k_b_proj":
                return self._heads(name, tensor, latent.nope_dim + latent.value_dim)[:, : latent.nope_dim]
            case "v_b_proj":
                return self._heads(name, tensor, latent.nope_dim + latent.value_dim)[:, latent.nope_dim :]
            case "kv_a_proj_with_mqa":
                return _rope_rows_halved(tensor[None], latent.rope_dim)[0]
            case "q_proj" | "q_b_proj":
                heads = self._heads(name, tensor, latent.nope_dim + latent.rope_dim)
                return _rope_rows_halved(heads, latent.rope_dim).reshape(tensor.shape)
        return tensor

    def _heads(self, name: str, tensor: np.ndarray, rows: int) -> np.ndarray:
        """[H * rows, ...] -> [H, rows, ...]"""
        H = self._config.num_heads
        if len(tensor) != H * rows:
            raise ValueError(f"tensor {self._stored_as[name]} has {len(tensor)} rows, but the model needs {H * rows}")
        return tensor.reshape(H, rows, *tensor.shape[1:])


def _rope_rows_halved(heads: np.ndarray, rope_dim: int) -> np.ndarray:
    """[H, rows, ...], the last rope_dim rows of each head from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...)."""
    plain, rope = np.split(heads, [heads.shape[1] - rope_dim], axis=1)
    return np.concatenate([plain, rope[:, 0::2], rope[:, 1::2]], axis=1)
