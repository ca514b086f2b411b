"""The layers that every family is made of. Arrays: T tokens, E hidden width, H heads, D head size."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from kernels_pallas import (
    ACTIVATIONS,
    AttentionBatch,
    Norm,
    Normed,
    add_linear,
    add_rms_norm,
    gated_linear,
    linear,
    linear_parts,
    rms_norm,
    sum_parts,
)
from models.config import Activation, ModelConfig, RopeScaling
from models.sharding import unfuse

Dtype = jnp.dtype | type
# x [T, E], and either parts [any, T, E] that are still to be added to it, or its norm, if nothing is.
Stream = tuple[jax.Array, jax.Array | Normed]


@dataclass(frozen=True)
class Compute:
    """How a model's arithmetic is done, whatever its family.

    Attributes:
      dtype: of weights and activations; norms, rotary embedding, softmax and logits are float32 in any case.
      attention_backend: a resolved name of kernels_pallas.attention_backend.
      mesh: of models.sharding.make_mesh, over which the model is split; None: it is on one device.
      deterministic: a token's result is the same to the bit in any step.
    """

    dtype: Dtype
    attention_backend: str
    mesh: Mesh | None = None
    deterministic: bool = False

    @property
    def kernels(self) -> dict[str, Any]:
        """How linear layers and norms run. Over several devices they are XLA's, which splits them."""
        if self.shards > 1:
            return {"backend": "reference"}
        return {"backend": self.attention_backend, "deterministic": self.deterministic}

    @property
    def shards(self) -> int:
        """Over how many devices a layer is split."""
        return 1 if self.mesh is None else self.mesh.shape["tensor"]

    def kv_heads(self, config: ModelConfig) -> int:
        """KV heads on all devices together, of which each has at least one: its own, or one that others have too."""
        return max(config.num_kv_heads, self.shards)


class Layer(nn.Module):
    """A decoder layer in two sublayers: attention, in which tokens see others, and a feed-forward, of each token alone.

    Families have layers with `attend` and `feed_forward`; their modules are made in `setup`, as both may need them.
    """

    def attend(self, stream: Stream, rotary: Any, cache: Any, batch: AttentionBatch) -> tuple[Stream, Any]:
        """The stream [T, E] up to the feed-forward, and the cache."""
        raise NotImplementedError

    def feed_forward(self, stream: Stream, num_tokens: jax.Array, following: Norm | None = None) -> Stream:
        """The stream [any, E] behind the layer. num_tokens: int32[]; the rows behind them are padding. following: the
        norm that follows the layer, which may make it on its way."""
        raise NotImplementedError


def lowered_once(layer: Layer, method: str, *args: Any) -> Any:
    """The method's result; of layers that differ in nothing but their weights, it is traced and lowered once."""
    if layer.is_initializing():
        return getattr(layer, method)(*args)
    return _apply(*layer.unbind(), method, *args)


@partial(jax.jit, static_argnums=(0, 2))
def _apply(layer: Layer, variables: Any, method: str, *args: Any) -> Any:
    return layer.apply(variables, *args, method=method)


class Linear(nn.Module):
    """x [T, in] -> [T, out]. The kernel is [out, in], as checkpoints have it: fusing projections is concatenating.

    `out_dtype` None is the compute dtype. How weights are stored is nobody else's business.
    """

    features: int
    compute: Compute
    use_bias: bool = False
    out_dtype: Dtype | None = None

    def __call__(self, x: jax.Array | Normed) -> jax.Array:
        return sum_parts(self.parts(x), self.out_dtype or self.compute.dtype)

    def parts(self, x: jax.Array | Normed) -> jax.Array:
        """What the result is the sum of, for who adds it to something: [parts, T, out]."""
        return self.onto(x)[1]

    @nn.compact
    def onto(self, x: Any, total: Any = None, norm: Norm | None = None) -> Stream:
        """x [T, in] -> the stream in which the result follows `total` [T, out], and comes before `norm`, if given."""
        dtype = self.compute.dtype
        kernel = self.param("kernel", _kernel_init, (self.features, x.shape[-1]), dtype)
        if norm is not None and not self.use_bias:
            return add_linear(total, x, kernel, norm, **self.compute.kernels)
        parts = linear_parts(x, kernel, out_dtype=self.out_dtype or dtype, **self.compute.kernels)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
            parts = (sum_parts(parts, self.out_dtype or dtype) + bias)[None]
        return total, parts


class GatedLinear(nn.Module):
    """x [T, in] -> activation(gate) * up, [T, out], of one kernel [2 out, in]: the gate's rows, then up's."""

    features: int
    activation: Activation
    compute: Compute
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array | Normed) -> jax.Array:
        F, dtype = self.features, self.compute.dtype
        kernel = self.param("kernel", _kernel_init, (2 * F, x.shape[-1]), dtype)
        if not self.use_bias and self.compute.shards == 1:
            return gated_linear(x, kernel, self.activation, **self.compute.kernels)
        y = linear(x, kernel, out_dtype=dtype, **self.compute.kernels)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (2 * F,), dtype)
        gate, up = unfuse(y, (F, F), self.compute.shards)
        return ACTIVATIONS[self.activation](gate) * up


class Embedding(nn.Module):
    """A table [V, E]: a row for each token id, and, where the model ties them, the output head."""

    vocab_size: int
    features: int
    compute: Compute

    def setup(self) -> None:
        init = nn.initializers.normal(1.0)
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features), self.compute.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32[T] -> [T, E]. Ids are validated before they reach the device."""
        return self.embedding[tokens]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> float32[R, V]."""
        return linear(hidden, self.embedding, out_dtype=jnp.float32, **self.compute.kernels)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, in float32 (arXiv 1910.07467)."""

    epsilon: float
    compute: Compute
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.compute.dtype)
        return rms_norm(x, scale, self.epsilon, self.offset, deterministic=self.compute.deterministic)


class AddNorm(nn.Module):
    """A stream -> its sum [T, E], and the RMSNorm of that, if it is not there yet."""

    features: int
    epsilon: float
    compute: Compute
    offset: float = 0.0

    def setup(self) -> None:
        self.scale = self.param("scale", nn.initializers.ones, (self.features,), self.compute.dtype)

    @property
    def norm(self) -> Norm:
        """For who can make it on the way."""
        return Norm(self.scale, self.epsilon, self.offset)

    def __call__(self, x: jax.Array, rest: jax.Array | Normed) -> tuple[jax.Array, jax.Array | Normed]:
        if isinstance(rest, Normed):
            return x, rest
        return add_rms_norm(x, rest, self.scale, self.epsilon, self.offset, **self.compute.kernels)


class NormScale(nn.Module):
    """The weight of an RMSNorm that an operation applies on its way: [features]."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("scale", nn.initializers.ones, (self.features,), self.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last axis, in float32 (arXiv 1607.06450)."""

    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.dtype).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(self.dtype)


def begin_stream(x: jax.Array) -> Stream:
    """x [T, E] as something to be added to nothing, for layers that begin with adding."""
    return x - x, x[None]  # XLA has a kernel for zeros, but none for what it makes along with x


def settled(x: jax.Array, rest: jax.Array | Normed) -> jax.Array:
    """A stream's sum [T, E]."""
    return x if isinstance(rest, Normed) else x + sum_parts(rest, x.dtype)


def _kernel_init(key: jax.Array, shape: tuple[int, int], dtype: Dtype) -> jax.Array:
    """Keeps the variance of what passes through: the fan-in is the last axis."""
    return nn.initializers.normal(1 / math.sqrt(shape[-1]))(key, shape, dtype)


def rotary_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """int32[T] -> cos and sin, float32[T, 1, rotary_dim / 2], of the rotary embedding (arXiv 2104.09864)."""
    rotary_dim = config.rotary_dim or config.head_dim
    frequencies, magnitude = rotary_frequencies(rotary_dim, config.rope_theta, config.rope_scaling)
    angles = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(frequencies)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """float32[D / 2] in radians a token, and what cos and sin are multiplied by."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    magnitude = 1.0
    if scaling is not None:
        match scaling.kind:
            case "linear":
                frequencies = frequencies / scaling.factor
            case "factors":
                frequencies = frequencies / np.asarray(scaling.factors)
                magnitude = scaling.attention_factor or 1.0
            case "llama3":
                frequencies = _llama3_frequencies(frequencies, scaling)
            case "yarn":
                frequencies = _yarn_frequencies(frequencies, head_dim, theta, scaling)
                magnitude = scaling.attention_factor or (
                    1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1
                )
    return frequencies.astype(np.float32), magnitude


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched by the factor, short ones kept, those between interpolated."""
    turns = scaling.original_context * frequencies / (2 * math.pi)  # over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_frequencies(frequencies: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN (arXiv 2309.00071): as llama3's, but interpolated over dimensions between two numbers of rotations."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    kept = 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
