"""Taking tokens straight from the output head, where there is a kernel for it: on Hopper."""

import jax


def best_tokens(
    x: jax.Array,
    kernel: jax.Array,
    keys: jax.Array | None = None,
    temperature: jax.Array | None = None,
    *,
    backend: str,
    deterministic: bool = False,
) -> jax.Array | None:
    """The lowest token with the best score in each row, -1 if there is a NaN. Scores are logits, x kernel^T in float32
    and never rounded.

    Args:
      x: [R, E].
      kernel: [V, E].
      keys, temperature: uint32[R, 2] and float32[R], both or neither. Where a row's temperature is not 0, its scores
        are logits / temperature + noise (see kernels_pallas.noise), to what float32 rounds off.
      deterministic: tokens are those of logits that come from `linear`.

    Returns:
      int32[R], or None if no kernel can do it.
    """
    if backend != "mosaic_gpu" or (deterministic and keys is not None):
        return None
    from kernels_pallas.gpu import head

    return None if head.unsupported(x, kernel) else head.best_tokens(x, kernel, keys, temperature)
