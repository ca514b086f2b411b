"""Each of GGUF's quantizations, read back from a file. The gguf package quantizes the simple ones; blocks of the others
are packed here, from numbers that are known, as ggml lays them out."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from models.gguf_reader import GGUFSource

ROWS, COLUMNS = 3, 512
STEPS = {  # the largest error, as a part of a block's largest absolute value (of its range, where it has a minimum)
    Type.F16: 2.0**-11,
    Type.BF16: 2.0**-8,
    Type.Q8_0: 0.51 / 127,
    Type.Q4_0: 1.01 / 8,  # the end that has no number of its own is clamped
    Type.Q4_1: 0.51 / 15,
    Type.Q5_0: 1.01 / 16,
    Type.Q5_1: 0.51 / 31,
}


def read_back(path: Path, stored: np.ndarray, kind: Type) -> np.ndarray:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tensor("blk.0.ffn_down.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(path)
    assert source.names == ["model.layers.0.mlp.down_proj.weight"]
    return source.read(source.names[0])


@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)
def test_what_the_package_quantizes(kind: Type, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    values += rng.standard_normal((ROWS, 1)).astype(np.float32)  # so that a forgotten minimum is seen
    read = read_back(tmp_path / "model.gguf", gguf.quants.quantize(values, kind), kind)
    assert read.dtype == np.float32 and read.shape == values.shape
    blocks, errors = (x.reshape(ROWS, -1, 32) for x in (values, np.abs(read - values)))
    has_minimum = kind in (Type.Q4_1, Type.Q5_1)
    size = np.ptp(blocks, axis=-1) if has_minimum else np.abs(blocks).max(axis=-1)
    assert (errors.max(axis=-1) <= STEPS[kind] * size + 2.0**-9).all()
    assert errors.max() > 0


def halves(rng, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """float16[blocks, 1], as bytes and as numbers."""
    numbers = rng.uniform(0.01, 0.1, (blocks, 1)).astype(np.float16)
    return numbers.view(np.uint8), numbers.astype(np.float32)


def packed_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Two times eight 6-bit numbers in 12 bytes: the last four of each are cut into 4 bits and 2."""
    low = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minima)]
    return np.concatenate([*low, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], axis=1)


def q4_or_q5_k(rng, blocks: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """256 numbers in eight groups: value = d * scale * q - d_min * minimum."""
    d, d_value = halves(rng, blocks)
    d_min, d_min_value = halves(rng, blocks)
    scales, minima = (rng.integers(0, 64, (blocks, 8)).astype(np.uint8) for _ in range(2))
    q = rng.integers(0, 1 << bits, (blocks, 8, 32)).astype(np.uint8)
    nibbles = (q[:, 0::2] & 15 | (q[:, 1::2] & 15) << 4).reshape(blocks, 128)
    high = np.bitwise_or.reduce(q >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    parts = [d, d_min, packed_scales(scales, minima), *([high] if bits == 5 else []), nibbles]
    values = (d_value * scales)[..., None] * q - (d_min_value * minima)[..., None]
    return np.concatenate(parts, axis=1), values.reshape(blocks, 256)


def q6_k(rng, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """256 numbers in sixteen groups: value = d * scale * (q - 32); in each half, quarters share bytes."""
    d, d_value = halves(rng, blocks)
    scales = rng.integers(-128, 128, (blocks, 16)).astype(np.int8)
    q = rng.integers(0, 64, (blocks, 256)).astype(np.uint8)
    quarters = q.reshape(blocks, 2, 4, 32)
    low = (quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4).reshape(blocks, 128)
    high = np.bitwise_or.reduce(quarters >> 4 << np.array([[0], [2], [4], [6]], np.uint8), axis=2).reshape(blocks, 64)
    values = d_value * np.repeat(scales.astype(np.float32), 16, axis=1) * (q.astype(np.float32) - 32)
    return np.concatenate([low, high, scales.view(np.uint8), d], axis=1), values


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_blocks_of_known_numbers(kind: Type, tmp_path: Path) -> None:
    rng, blocks = np.random.default_rng(0), ROWS * COLUMNS // 256
    stored, values = q6_k(rng, blocks) if kind is Type.Q6_K else q4_or_q5_k(rng, blocks, 4 + (kind is Type.Q5_K))
    read = read_back(tmp_path / "model.gguf", stored.reshape(ROWS, -1), kind)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, values.reshape(ROWS, COLUMNS), rtol=1e-5, atol=1e-5)


def test_one_that_is_not_supported_is_named(tmp_path: Path) -> None:
    stored = np.zeros((1, gguf.GGML_QUANT_SIZES[Type.Q8_K][1]), np.uint8)
    with pytest.raises(ValueError, match=r"down_proj\.weight is stored as Q8_K"):
        read_back(tmp_path / "model.gguf", stored, Type.Q8_K)
