"""The TPU kernels against `reference`, in the interpreter that looks for races and for reads out of bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import ragged_paged_attention
from tests.kernels.tpu.ragged import Case, Sizes, from_tpu, make_case, random_lens, to_tpu

reference = jax.jit(ragged_paged_attention, static_argnames=("scale", "window", "soft_cap", "backend"))
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def races(capsys):
    """Whether the interpreter has seen a race. Newer ones raise; 0.11 prints, and forgets at the next kernel."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")):
        yield lambda: "RACE DETECTED" in capsys.readouterr().out
    pltpu.reset_tpu_interpret_mode_state()
    jax.clear_caches()  # what one shape compiled is of no use to the next, and takes 100 MB


def check(case: Case, races, **options) -> None:
    dtype = case.q.dtype.name
    if options.pop("sinks", False):
        options["sinks"] = jnp.linspace(-2, 3, case.q.shape[1], dtype=jnp.float32)
    options["scale"] = case.q.shape[-1] ** -0.5
    out, cache = jax.block_until_ready(
        ragged_paged_attention(*case[:3], to_tpu(case.cache), case.batch, backend="mosaic_tpu", **options)
    )
    assert not races()
    zeros = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x), case)
    expected, written = reference(*zeros, backend="reference", **options)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    for ours, theirs in zip(from_tpu(cache, case.q.shape[-1]), written, strict=True):
        np.testing.assert_array_equal(as_numbers(ours)[1:], as_numbers(theirs)[1:])


def as_numbers(x: jax.Array) -> np.ndarray:
    """float32, with zeros for what nothing was written to."""
    return np.nan_to_num(np.asarray(x.astype(jnp.float32)))


# H, K, D, N, P, type, options
FEW: list[tuple] = [
    (9, 3, 64, 16, 9, "float32", {}),
    (4, 2, 128, 16, 40, "bfloat16", {}),
    (4, 1, 256, 32, 6, "bfloat16", {"window": 40}),
    (8, 1, 64, 64, 6, "float32", {"window": 100, "soft_cap": 4.0, "sinks": True}),
]


@pytest.mark.parametrize(("H", "K", "D", "N", "P", "dtype", "options"), FEW, ids=str)
def test_matches_the_reference(H, K, D, N, P, dtype, options, races):
    check_steps(races, options, H=H, K=K, D=D, N=N, P=P, dtype=dtype)


EIGHT_BITS = [
    ("int8", 6, 2, 128, "float32", {"window": 150, "soft_cap": 4.0, "sinks": True}),
    ("float8_e4m3fn", 9, 3, 64, "bfloat16", {}),
]


@pytest.mark.parametrize(("cache_dtype", "H", "K", "D", "dtype", "options"), EIGHT_BITS, ids=str)
def test_matches_the_reference_in_eight_bits(cache_dtype, H, K, D, dtype, options, races):
    check_steps(races, options, H=H, K=K, D=D, N=128, P=5, dtype=dtype, cache_dtype=cache_dtype)


def check_steps(races, options, *, H, D, N, P, **shape):
    rng = np.random.default_rng(H * D + N)
    sizes = Sizes(H=H, D=D, N=N, P=P, T=5, S=5, **shape)
    for lens in (random_lens(rng, sizes, 5, 0), [(N * P, 1), (1, 1)]):
        check(make_case(rng, sizes, lens, len(lens)), races, **options)
    sizes = Sizes(H=H, D=D, N=N, P=P, T=150, S=7, **shape)
    for num_decodes, num_prompts in ((3, 3), (0, 4)):
        lens = random_lens(rng, sizes, num_decodes, num_prompts)
        check(make_case(rng, sizes, lens, num_decodes), races, **options)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(24))
def test_matches_the_reference_at_random(seed, races):
    rng = np.random.default_rng(seed)
    G, K = int(rng.choice([1, 2, 3, 4, 7, 8, 16])), int(rng.choice([1, 2, 3, 4, 8]))
    D, N = int(rng.choice([16, 64, 80, 96, 128, 256])), int(rng.choice([16, 32, 64, 128]))
    P = int(rng.integers(2, 1500 // N))
    dtype = str(rng.choice(["float32", "bfloat16"]))
    cache_dtype = str(rng.choice(["", "int8", "float8_e4m3fn"]))
    if cache_dtype:
        N, P = 128, int(rng.integers(2, 12))
    options: dict = {}
    if rng.random() < 0.5:
        options["window"] = int(rng.integers(1, N * P))
    if rng.random() < 0.3:
        options["soft_cap"] = 5.0
    if rng.random() < 0.3:
        options["sinks"] = True
    S = int(rng.integers(2, 20))
    sizes = Sizes(G * K, K, D, N, P, T=S, S=S, dtype=dtype, cache_dtype=cache_dtype)
    for num_decodes in (S, int(rng.integers(0, S))):
        lens = random_lens(rng, sizes, num_decodes, 0)
        check(make_case(rng, sizes, lens, num_decodes), races, **options)
    sizes = Sizes(G * K, K, D, N, P, T=int(rng.integers(S + 5, 600)), S=S, dtype=dtype, cache_dtype=cache_dtype)
    for _ in range(3):
        num_prompts = int(rng.integers(1, min(S, 5) + 1))
        num_decodes = int(rng.integers(0, S - num_prompts + 1))
        lens = random_lens(rng, sizes, num_decodes, num_prompts)
        check(make_case(rng, sizes, lens, num_decodes), races, **options)


def test_the_interpreter_finds_a_race(races):
    """What the other tests rest on: a buffer used before its copy is waited for."""

    def kernel(x_ref, out_ref, buffer, sem):
        copy = pltpu.make_async_copy(x_ref, buffer, sem)
        copy.start()
        out_ref[...] = buffer[...]
        copy.wait()

    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    )
    try:
        jax.block_until_ready(call(jnp.ones((8, 128))))
        found = races()
    except Exception as error:
        found = "race" in str(error).lower()
    assert found
