"""What a model's multi-head latent attention is like (arXiv 2405.04434)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Widths. Hashable, as ModelConfig is.

    Attributes:
      query_rank: of the vector that the queries are made from; None: they are made from the hidden state itself.
      rank: of the latent vector that the keys and values of all heads are made from.
      nope_dim, rope_dim: of a head's queries and keys, without and with rotary embedding; all heads share the key with.
      value_dim: of a head's values.
    """

    query_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name in ("query_rank", "rank", "nope_dim", "rope_dim", "value_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model config: {name} of latent attention must be at least 1, not {value}")
