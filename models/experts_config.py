"""What the sparse feed-forward layers of a model are like."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts, and how a token comes to its own. Hashable, as ModelConfig is.

    Attributes:
      count, chosen: experts in a layer, and how many of them a token goes to.
      intermediate_size: inner width of one expert.
      layers: one entry a layer: whether it has experts; the others have a dense feed-forward.
      softmax_over_chosen: the weights of a token's experts are a softmax over their logits alone (gpt-oss); otherwise
        one over all experts, of which the largest are taken.
      normalise: those are divided by their sum.
      bias: whether the router and the experts have biases.
      swiglu_limit, swiglu_alpha: gpt-oss's bound on gate and up, and the steepness of its sigmoid; None: plain SwiGLU.
    """

    count: int
    chosen: int
    intermediate_size: int
    layers: tuple[bool, ...]
    softmax_over_chosen: bool = False
    normalise: bool = True
    bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError(f"model config: experts need an inner width of at least 1, not {self.intermediate_size}")
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"model config: a token cannot go to {self.chosen} of {self.count} experts")
