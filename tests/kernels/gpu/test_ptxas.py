"""ptxas is asked for its version once, where kernels are lowered for a start."""

from unittest.mock import Mock

import pytest

from kernels_pallas import lowering


def test_asked_once(monkeypatch):
    fragmented_array = pytest.importorskip("jax.experimental.mosaic.gpu.fragmented_array")
    extension = getattr(fragmented_array.mgpu_lib, "_mosaic_gpu_ext", None)
    if extension is None:
        pytest.skip("needs jax's CUDA plugin")
    question = Mock(return_value=90)
    monkeypatch.setattr(extension, "_get_ptxas_isa_version", question)
    with lowering("mosaic_gpu"):
        assert [extension._get_ptxas_isa_version() for _ in range(3)] == [90] * 3
    assert question.call_count == 1
    assert extension._get_ptxas_isa_version is question
