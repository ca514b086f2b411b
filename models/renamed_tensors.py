"""A checkpoint's tensors under other names."""

from collections.abc import Collection, Mapping

import numpy as np

from models.parts import TensorSource


class RenamedTensors:
    """A TensorSource: `source` under the names of `stored_as` {name: name in `source`}, and nothing else of it."""

    def __init__(self, source: TensorSource, stored_as: Mapping[str, str]):
        self._source, self._stored_as = source, stored_as

    @property
    def names(self) -> Collection[str]:
        return self._stored_as.keys()

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        return self._source.read(self._stored_as[name], out)
