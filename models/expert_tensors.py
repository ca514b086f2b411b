"""The layouts in which checkpoints store experts, presented as one: each expert's own `experts.N.gate_proj.weight`
[F, E], `up_proj` [F, E] and `down_proj` [E, F], and their biases where there are any.

Checkpoints have them so, or under Mixtral's names, or stacked: `experts.gate_up_proj` [X, 2F, E] and
`experts.down_proj` [X, E, F]. gpt-oss stacks them transposed, with gate and up in alternate columns; its released
checkpoints are in MXFP4 on top, which has them transposed back.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial

import ml_dtypes
import numpy as np

from models.parts import TensorSource
from models.safetensors_reader import SafetensorsSource

Read = Callable[[], np.ndarray]

_RENAMED = (
    (re.compile(r"\.block_sparse_moe\.gate\."), ".mlp.gate."),
    (re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.w1\."), r".mlp.experts.\1.gate_proj."),
    (re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.w3\."), r".mlp.experts.\1.up_proj."),
    (re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.w2\."), r".mlp.experts.\1.down_proj."),
)
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")


class ExpertTensors:
    """A TensorSource: `source`, with `num_experts` in each layer, under the names above.

    `gpt_oss` says which of the stacked layouts it is.
    """

    def __init__(self, source: TensorSource, num_experts: int, *, gpt_oss: bool = False):
        self._source, self._num_experts, self._gpt_oss = source, num_experts, gpt_oss
        self._expert = lru_cache(maxsize=1)(self._read_expert)  # gate and up are read one after the other
        self._stored_as: dict[str, str] = {}
        self._stacked: dict[str, Read] = {}
        for name in source.names:
            if stacked := _STACKED.fullmatch(name):
                self._add_stack(name, *stacked.groups())
            else:
                self._stored_as[_renamed(name)] = name

    @property
    def names(self) -> list[str]:
        return [*self._stored_as, *self._stacked]

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        if name in self._stacked:
            return self._stacked[name]()
        return self._source.read(self._stored_as[name], out)

    def _add_stack(self, name: str, experts: str, projection: str, suffix: str | None) -> None:
        if suffix == "_scales":
            return  # read together with the blocks
        if suffix == "_blocks" and f"{experts}.{projection}_scales" not in self._source.names:
            raise ValueError(f"the checkpoint has tensor {name}, but not the scales that belong to it")
        kind = "bias" if suffix == "_bias" else "weight"
        for n in range(self._num_experts):
            expert = partial(self._expert, name, n, suffix)
            if projection == "down_proj":
                self._stacked[f"{experts}.{n}.down_proj.{kind}"] = expert
            else:
                self._stacked[f"{experts}.{n}.gate_proj.{kind}"] = partial(self._half, expert, 0)
                self._stacked[f"{experts}.{n}.up_proj.{kind}"] = partial(self._half, expert, 1)

    def _read_expert(self, name: str, n: int, suffix: str | None) -> np.ndarray:
        """One expert's matrix [out, in] or bias [out]."""
        if suffix == "_blocks":
            scales = name.removesuffix("_blocks") + "_scales"
            return dequantize_mxfp4(self._row(name, n), self._row(scales, n))
        row = self._row(name, n)
        return row.T if self._gpt_oss else row

    def _row(self, name: str, n: int) -> np.ndarray:
        if isinstance(self._source, SafetensorsSource):
            return self._source.read_row(name, n, self._num_experts)
        return self._source.read(name)[n]

    def _half(self, expert: Read, half: int) -> np.ndarray:
        both = expert()
        return both[half::2] if self._gpt_oss else np.split(both, 2)[half]


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """OCP microscaling FP4 (v1.0): uint8[rows, G, 16], two e2m1 numbers a byte, the lower first, and uint8[rows, G],
    the exponent (with bias 127) that 32 of them share -> float32[rows, 32 * G]."""
    codes = np.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)[codes]
    return np.ldexp(values, scales[..., None].astype(np.int32) - 127).reshape(len(scales), -1)


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name
