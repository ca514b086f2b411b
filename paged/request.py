"""One sequence to generate, from arrival to its last token. Plain data: the scheduler moves it along."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from paged.outputs import FinishReason
from paged.sampling_params import SamplingParams


class RequestStatus(Enum):
    WAITING = "waiting"  # in the queue: new, or preempted and to be recomputed
    RUNNING = "running"  # holds a slot and blocks
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and one completion of it (n > 1 is n requests: a leader and its siblings).

    Two clocks run here. The host schedules one step ahead of what it has read, so a token that a dispatched
    step will sample exists before its value is known: it is counted in `num_inflight_tokens` until
    `output_token_ids` has it. `num_computed_tokens` counts tokens whose keys and values are in the cache
    once everything dispatched so far has run.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float  # seconds, time.monotonic()
    max_total_tokens: int  # prompt + output can never exceed this (max_tokens and context length combined)
    seed: int = 0  # resolved: from the parameters, or drawn by the engine
    stop_token_ids: frozenset[int] = frozenset()  # resolved: end-of-sequence (unless ignored) and the caller's
    priority: int = 0  # lower is served first, under the priority policy
    cache_salt: str | None = None  # blocks are shared only between requests of equal salt
    index: int = 0  # which of the n completions
    tag: Any = None  # the caller's own handle of this completion
    siblings: list["Request"] = field(default_factory=list)  # queued once this leader's prompt is computed

    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    slot: int = -1  # row of the per-slot device arrays while running
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # chained hashes of the known full blocks
    num_computed_tokens: int = 0
    num_inflight_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix index at first admission
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None

    # The scheduler's own notes.
    queue_number: int = 0  # order of arrival, among requests of equal arrival_time
    hash_root: bytes = b""  # what the first block's hash is chained to
    num_registered_blocks: int = 0  # leading blocks of the table that the prefix index has been offered
    num_lost_tokens: int = 0  # computed when it was last preempted

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose values the host has: prompt and read output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens and those that dispatched steps will sample."""
        return self.num_known_tokens + self.num_inflight_tokens

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Known tokens at positions start..stop-1, without joining prompt and output."""
        p = len(self.prompt_token_ids)
        if stop <= p:
            return self.prompt_token_ids[start:stop]
        if start >= p:
            return self.output_token_ids[start - p : stop - p]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - p]

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
