"""Sparse feed-forward layers: a router sends each token to a few of many experts (arXiv 1701.06538).

Rows are sorted by expert, and each expert multiplies its own (kernels_pallas.grouped_matmul). Letters: T tokens,
E hidden width, X experts, k experts a token goes to, F an expert's inner width, M = T * k rows.

Padding tokens go to no expert. A token's result depends on the token and on T, the size of the step, alone: not on
which tokens share the step or its experts. Its experts' outputs are added in float32, the best expert's first.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import ACTIVATIONS, grouped_matmul
from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from models.layers import Compute, Linear
from models.sharding import unfuse

IN_KERNELS = ("silu", "gelu_tanh", "relu")  # activations that a GPU kernel can apply
MANY = 4096  # choices that are quicker to sort than to compare all with all


class GroupedLinear(nn.Module):
    """x [M, in], rows sorted by expert -> [M, out], or [M, out / 2] with an `activation` that one half gates the other
    by. The kernel is [X, out, in]."""

    experts: int
    features: int
    compute: Compute
    use_bias: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, expert: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """expert: int32[M], the expert of each row; group_sizes: int32[X], the rows of each expert."""
        kernel = self.param(
            "kernel", nn.initializers.normal(), (self.experts, self.features, x.shape[-1]), self.compute.dtype
        )
        backend = self.compute.kernels["backend"]
        y = grouped_matmul(x, kernel, group_sizes, self.activation, backend=backend)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.experts, self.features), self.compute.dtype)[expert]
        return y


class SparseFeedForward(nn.Module):
    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """x [T, E] -> [T, E]; zeros in padding rows, those from num_tokens on."""
        c = self.config.experts
        assert c is not None
        T, E = x.shape
        router = Linear(c.count, self.compute, use_bias=c.bias, out_dtype=jnp.float32, name="router")
        bias = None
        if c.scoring == "sigmoid":  # in float32 always: small differences between large numbers decide
            bias = self.param("choice_bias", nn.initializers.zeros, (c.count,), jnp.float32)
        weights, chosen = route(router(x), c, bias)
        is_token = (jnp.arange(T) < num_tokens)[:, None]
        order, place, group_sizes = sort_by_expert(jnp.where(is_token, chosen, c.count), c.count)
        expert = jnp.minimum(chosen.reshape(-1)[order], c.count - 1)
        rows = x[order // c.chosen]
        plain = not c.bias and c.swiglu_limit is None and self.compute.shards == 1
        fused = plain and self.config.activation in IN_KERNELS
        activation = ACTIVATIONS[self.config.activation] if fused else None
        gate_up = GroupedLinear(c.count, 2 * c.intermediate_size, self.compute, c.bias, activation, name="gate_up")
        down = GroupedLinear(c.count, E, self.compute, c.bias, name="down")
        inner = gate_up(rows, expert, group_sizes)
        inner = inner if fused else gated(inner, self.config, self.compute.shards)
        y = down(inner, expert, group_sizes)
        y = y[place].reshape(T, c.chosen, E).astype(jnp.float32)
        mixed = jnp.sum(y * weights[..., None], axis=1)
        return jnp.where(is_token, mixed, 0).astype(self.compute.dtype)


def route(logits: jax.Array, config: ExpertsConfig, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Router logits float32[T, X] -> the weights of each token's experts, float32[T, k], and which they are, best
    first, int32[T, k]. `bias`: float32[X], added to the scores that experts are chosen by."""
    softmax = config.scoring == "softmax" and config.normalise and config.groups == 1 and bias is None
    if softmax or config.scoring == "softmax_over_chosen":  # these are the same
        scores, chosen = top_k(logits, config.chosen)
        return jax.nn.softmax(scores, axis=-1) * config.scale, chosen
    scores = jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    _, chosen = top_k(_within_best_groups(scores if bias is None else scores + bias, config), config.chosen)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights * config.scale, chosen


def _within_best_groups(scores: jax.Array, config: ExpertsConfig) -> jax.Array:
    """float32[T, X], with minus infinity for the experts of the other groups."""
    if config.groups == 1:
        return scores
    grouped = scores.reshape(len(scores), config.groups, -1)
    best = jnp.sum(lax.top_k(grouped, 2 if config.scoring == "sigmoid" else 1)[0], axis=-1)
    _, groups = lax.top_k(best, config.chosen_groups)
    kept = jnp.any(groups[:, :, None] == jnp.arange(config.groups), axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """lax.top_k of float32[T, X]."""
    return lax.platform_dependent(
        scores, cuda=partial(top_k_by_rank, k=k), default=lambda scores: tuple(lax.top_k(scores, k))
    )


def top_k_by_rank(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """By how many are greater than each: a GPU compares all with all in less time than it sorts a few."""
    i = jnp.arange(scores.shape[1])
    other, one = scores[:, None, :], scores[:, :, None]
    ranks = jnp.sum((other > one) | ((other == one) & (i[None, :] < i[:, None])), axis=-1, dtype=jnp.int32)
    nth = ranks[:, None, :] == jnp.arange(k)[:, None]
    best = jnp.sum(jnp.where(nth, scores[:, None, :], 0), axis=-1)
    return best, jnp.sum(jnp.where(nth, i, 0), axis=-1, dtype=jnp.int32)


def sort_by_expert(chosen: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Orders the M choices of int32[T, k] by expert; num_experts marks a choice that goes nowhere and comes last.

    Returns:
      int32[M], the choice in each sorted row; int32[M], the sorted row of each choice; int32[X], how many rows each
      expert has.
    """
    flat = lax.optimization_barrier(chosen.reshape(-1))  # computed once, and not again in each comparison
    few = len(flat) <= MANY
    order, place = lax.platform_dependent(flat, cuda=sort_by_rank if few else sort, default=sort)
    group_sizes = jnp.sum(jnp.arange(num_experts)[:, None] == flat, axis=1, dtype=jnp.int32)
    return order, place, group_sizes


def sort(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32[M] -> the order of a stable sort, int32[M], and its inverse."""
    order = jnp.argsort(flat)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)


def sort_by_rank(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `sort`, for small numbers."""
    i = jnp.arange(len(flat))
    key = flat * len(flat) + i
    place = jnp.sum(key < key[:, None], axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(place == i[:, None], i, 0), axis=1, dtype=jnp.int32), place


def gated(gate_up: jax.Array, config: ModelConfig, shards: int) -> jax.Array:
    """[M, 2F] -> [M, F]: SwiGLU (arXiv 2002.05202) or such, or gpt-oss's, clamped, scaled and with a linear part."""
    c = config.experts
    assert c is not None
    gate, up = unfuse(gate_up, (c.intermediate_size,) * 2, shards)
    if c.swiglu_limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate = jnp.minimum(gate, c.swiglu_limit)
    up = jnp.clip(up, -c.swiglu_limit, c.swiglu_limit)
    return gate * nn.sigmoid(c.swiglu_alpha * gate) * (up + 1)
