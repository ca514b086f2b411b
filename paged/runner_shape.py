"""Every size that a compiled program depends on, and which programs there are."""

from dataclasses import dataclass
from typing import Any

from paged.packing import StepShape, at_least
from paged.sampler import Variant


@dataclass(frozen=True)
class RunnerShape:
    """Of one engine. The pool's own sizes are num_blocks and blocks_per_seq."""

    num_blocks: int
    block_size: int
    blocks_per_seq: int
    max_num_seqs: int
    vocab_size: int
    max_logprobs: int
    decode_sizes: tuple[int, ...]  # buckets of S; the last is max_num_seqs
    sampling_sizes: tuple[int, ...]  # buckets of rows that are sampled from; the last is max_num_seqs
    prompt_sizes: tuple[int, ...]  # buckets of T
    variants: tuple[Variant, ...]  # of the sampler, the cheapest first and "full" last
    cache_dtype: Any
    chain: int = 1  # decode steps that one call may run, of batches so small that a call costs more than a step ...
    largest_chained: int = 32  # ... the buckets of S up to this

    @property
    def steps(self) -> list[StepShape]:
        prompts = [StepShape(T, self.max_num_seqs, decode_only=False) for T in self.prompt_sizes]
        return [StepShape(S, S, decode_only=True) for S in self.decode_sizes] + prompts

    @property
    def largest_steps(self) -> list[StepShape]:
        """The largest decode step and the largest prompt step: no other needs more memory."""
        return [self.steps[len(self.decode_sizes) - 1], self.steps[-1]]

    def sampled_rows(self, step: StepShape) -> int:
        """Rows that are sampled from after a step: S, and some of padding."""
        return at_least(self.sampling_sizes, step.S)

    @property
    def samplings(self) -> list[tuple[int, Variant]]:
        """The rows and the variant of each sampling program, the dearest first."""
        return [(S, variant) for variant in reversed(self.variants) for S in reversed(self.sampling_sizes)]

    @property
    def largest_sampling(self) -> tuple[int, Variant]:
        """It needs the most memory."""
        return self.samplings[0]

    @property
    def chained(self) -> list[StepShape]:
        """The steps that a call may run several of. Their sampler is "random"."""
        if self.chain == 1 or "random" not in self.variants:
            return []
        return [StepShape(S, S, decode_only=True) for S in self.decode_sizes if self.largest_chained >= S]
