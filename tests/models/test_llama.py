"""What compiled programs rely on: layers lowered once, the same result for every backend's lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionBatch
from kernels_pallas.linear import through_xla
from models import ModelConfig, build_model, param_shapes

CONFIG = ModelConfig(
    architecture="MistralForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    sliding_windows=(None, 16) * 6,
)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def lowered(config: ModelConfig) -> str:
    model = build_model(config, dtype=jnp.float32)
    batch = AttentionBatch(ints(2), ints(2, 4), ints(3), ints(2), decode_only=True)  # type: ignore[arg-type]
    shapes = param_shapes(model), ints(2), ints(2), model.cache_shapes(8, 8, jnp.float32), batch
    return jax.jit(model.apply).lower(*shapes).as_text()


def test_layers_are_lowered_once_for_each_kind() -> None:
    """A function for each kind of layer, called once a layer: the number of dots does not grow with the depth."""
    dots = lowered(CONFIG).count("stablehlo.dot_general")
    shallow = ModelConfig(**{**CONFIG.__dict__, "num_layers": 2, "sliding_windows": (None, 16)})
    assert dots == lowered(shallow).count("stablehlo.dot_general")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 16, 40])
def test_project_is_a_matrix_product(rows: int, dtype) -> None:
    x = jax.random.normal(jax.random.key(0), (rows, 96), dtype)
    kernel = jax.random.normal(jax.random.key(1), (56, 96), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    np.testing.assert_allclose(
        jax.jit(through_xla, static_argnums=2)(x, kernel, jnp.float32), exact, rtol=1e-5, atol=1e-4
    )


def test_project_lowers_for_accelerators_as_a_plain_dot() -> None:
    x, kernel = jax.ShapeDtypeStruct((4, 96), jnp.bfloat16), jax.ShapeDtypeStruct((56, 96), jnp.bfloat16)
    for platform in ("cuda", "tpu"):
        traced = jax.jit(through_xla, static_argnums=2).trace(x, kernel, jnp.bfloat16)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.dot_general") == 1 and "optimization_barrier" not in text


def test_other_dtypes_and_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        build_model(CONFIG, dtype=jnp.float16)
    with pytest.raises(ValueError, match="fastest"):
        build_model(CONFIG, dtype=jnp.float32, attention_backend="fastest")
