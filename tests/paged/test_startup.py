"""The sizes that an engine starts with."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged import startup
from paged.memory import unreserved_memory
from paged.startup import DEFAULTS, num_compile_processes, prompt_sizes


@given(st.integers(1, 100_000), st.sampled_from(sorted(DEFAULTS)))
def test_prompt_buckets_rise_to_the_largest(largest, platform):
    sizes = prompt_sizes(largest, DEFAULTS[platform], platform)
    assert sizes[-1] == largest and list(sizes) == sorted(set(sizes))
    assert len(sizes) == 1 or sizes[0] == DEFAULTS[platform].smallest_prompt


@pytest.mark.parametrize(("largest", "last"), [(8192, (4096, 6144, 8192)), (5000, (2048, 4096, 5000)), (32, (32,))])
def test_a_gpu_has_one_more_below_the_largest(largest, last):
    assert prompt_sizes(largest, DEFAULTS["gpu"], "gpu")[-3:] == last


@pytest.mark.parametrize(
    ("cores", "gib", "backend", "shards", "directory", "count"),
    [
        (16, 8.2, "mosaic_gpu", 1, "kept", 5),
        (128, 8.2, "mosaic_gpu", 1, "kept", 5),
        (8, 8.2, "mosaic_gpu", 1, "kept", 3),
        (2, 8.2, "mosaic_gpu", 1, "kept", 0),
        (1, 8.2, "mosaic_gpu", 1, "kept", 0),
        (16, 2.5, "mosaic_gpu", 1, "kept", 2),
        (16, 0.0, "mosaic_gpu", 1, "kept", 0),
        (16, 8.2, "reference", 1, "kept", 0),
        (16, 8.2, "mosaic_gpu", 2, "kept", 0),
        (16, 8.2, "mosaic_gpu", 1, None, 0),
    ],
)
def test_processes_that_compile(cores, gib, backend, shards, directory, count, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(startup, "unreserved_memory", lambda device: int(gib * 2**30))
    model = SimpleNamespace(compute=SimpleNamespace(attention_backend=backend, shards=shards))
    store = SimpleNamespace(directory=directory and Path(directory))
    assert num_compile_processes(model, store) == count


@pytest.mark.parametrize(("stats", "gib"), [({"bytes_limit": 72 << 30}, 8), (None, 0)])
def test_memory_that_the_allocator_leaves(stats, gib, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert unreserved_memory(SimpleNamespace(memory_stats=lambda: stats)) == pytest.approx(gib * 2**30, abs=8)
