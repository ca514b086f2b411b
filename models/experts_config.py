"""What the sparse feed-forward layers of a model are like."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts, and how a token comes to its own. Hashable, as ModelConfig is.

    Attributes:
      count, chosen: experts in a layer, and how many of them a token goes to.
      intermediate_size: inner width of one expert.
      layers: one entry a layer: whether it has experts; the others have a dense feed-forward.
      scoring: from a token's logits to its experts' weights: "softmax" over all experts, "softmax_over_chosen", over
        the logits of the chosen alone (gpt-oss), or "sigmoid", each by itself; experts with sigmoids are chosen by
        weight plus a learned bias (DeepSeek-V3, arXiv 2412.19437).
      normalise: the weights of the chosen are divided by their sum.
      scale: the weights are multiplied by it in the end.
      groups, chosen_groups: the experts are divided into groups of neighbours, and a token chooses from the best groups
        alone: those with the best expert or, with sigmoids, with the best two by their sum (arXiv 2405.04434).
      shared: each token also goes to one feed-forward of the width of so many experts.
      bias: whether the router and the experts have biases.
      swiglu_limit, swiglu_alpha: gpt-oss's bound on gate and up, and the steepness of its sigmoid; None: plain SwiGLU.
    """

    count: int
    chosen: int
    intermediate_size: int
    layers: tuple[bool, ...]
    scoring: Literal["softmax", "softmax_over_chosen", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    shared: int = 0
    bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError(f"model config: experts need an inner width of at least 1, not {self.intermediate_size}")
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"model config: a token cannot go to {self.chosen} of {self.count} experts")
        if self.groups < 1 or self.count % self.groups:
            raise ValueError(f"model config: {self.count} experts do not make {self.groups} groups of the same size")
        if not 1 <= self.chosen_groups <= self.groups:
            raise ValueError(f"model config: a token cannot choose from {self.chosen_groups} of {self.groups} groups")
        group_size = self.count // self.groups
        if self.chosen > self.chosen_groups * group_size:
            raise ValueError(f"model config: {self.chosen_groups} groups of {group_size} have no {self.chosen} experts")
        if self.groups > 1 and self.scoring == "sigmoid" and group_size < 2:
            raise ValueError("model config: groups that are chosen by their best two experts need at least two each")
