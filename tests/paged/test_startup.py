"""The sizes that an engine starts with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged.startup import DEFAULTS, prompt_sizes


@given(st.integers(1, 100_000), st.sampled_from(sorted(DEFAULTS)))
def test_prompt_buckets_rise_to_the_largest(largest, platform):
    sizes = prompt_sizes(largest, DEFAULTS[platform], platform)
    assert sizes[-1] == largest and list(sizes) == sorted(set(sizes))
    assert len(sizes) == 1 or sizes[0] == DEFAULTS[platform].smallest_prompt


@pytest.mark.parametrize(("largest", "last"), [(8192, (4096, 6144, 8192)), (5000, (2048, 4096, 5000)), (32, (32,))])
def test_a_gpu_has_one_more_below_the_largest(largest, last):
    assert prompt_sizes(largest, DEFAULTS["gpu"], "gpu")[-3:] == last
