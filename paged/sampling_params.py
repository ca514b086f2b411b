"""How to sample one request: names, defaults and rules as in vLLM, validated on construction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from paged.errors import InvalidRequestError

GREEDY_BELOW = 1e-5
MAX_LOGIT_BIAS = 300


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
      n: completions to generate for the prompt; they share the prompt's cache blocks.
      presence_penalty, frequency_penalty: subtracted from the logits of generated tokens, once and per
        occurrence (OpenAI's definition), in [-2, 2].
      repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or output
        (CTRL, arXiv 1909.05858), > 0.
      temperature: divides the logits, in [0, 2]; below 1e-5 means greedy, and top_p, top_k, min_p are ignored.
      top_p: smallest set of tokens with at least this probability mass, in (0, 1] (arXiv 1904.09751).
      top_k: this many most likely tokens; 0 or -1 is off. Ties at the edge are all kept.
      min_p: tokens with at least this fraction of the top probability, in [0, 1] (arXiv 2407.01082).
      seed: makes the sampled noise a function of (seed, position, token id) alone; None or -1 draws one.
      stop: strings that end the generation; not part of the text unless include_stop_str_in_output.
      stop_token_ids: tokens that end it, beside the model's end-of-sequence tokens.
      ignore_eos: generate past the end-of-sequence tokens.
      max_tokens: most tokens to generate; None means up to the context length.
      min_tokens: end-of-sequence and stop tokens are forbidden before this many tokens.
      logprobs: report this many most likely tokens (-1 is all that the engine allows) beside the chosen one.
      prompt_logprobs: the same for every prompt token but the first.
      detokenize: produce text; off, only token ids come back (and `stop` is refused).
      skip_special_tokens, spaces_between_special_tokens: how text is made from tokens.
      logit_bias: token id -> value in [-100, 100] added to its logit; at most 300 entries.
      allowed_token_ids: only these tokens can be generated.

    Raises:
      InvalidRequestError: a value is out of its range; `param` names it.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self):
        """Normalise, then check every range."""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
