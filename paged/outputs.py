"""What a caller gets back: vLLM's output types, the increments they are made of, and the tokens that those are of."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate token: natural log of its probability under the model (before temperature and
    penalties), its rank (1 is the most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # the chosen token first, then the most likely ones in order


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds on time.monotonic()'s clock."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0


class TokenScores(NamedTuple):
    """The logprobs of one position, as the device gives them: of the chosen token, and of the most likely ones in
    order."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step added to one completion, before it is text. Fields are as in CompletionDelta."""

    token_ids: list[int]
    scores: list[TokenScores] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int | None = None  # on the first token
    prompt_scores: list[TokenScores | None] | None = None  # on the first token of index 0
    error: str | None = None
    metrics: RequestMetrics | None = None


@dataclass(slots=True)
class StepOutput:
    """The tokens of one step. A completion is named by its tag, the caller's own handle for it.

    Most completions get one more token and there is nothing else to say: they are in `tags` and `token_ids`, which
    are of one length. First and last tokens, logprobs and errors are in `deltas`. None is in both.
    """

    tags: list[Any] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    deltas: list[tuple[Any, TokenDelta]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What was added to one completion of a request. The concatenated `text` of a completion's deltas
    is its whole text; half characters and possible stop strings are held back until they are decided."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # on the delta that has the first token, index 0
    error: str | None = None  # set with finish_reason "error"
    metrics: RequestMetrics | None = None  # with a finish_reason, unless a server's front end found a stop string


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
