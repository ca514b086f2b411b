"""From sampled tokens to what the caller sees: text, stop strings, logprobs, one request at a time."""

from typing import Any

import jax
import numpy as np

from paged.detokenizer import IncrementalDetokenizer
from paged.outputs import CompletionDelta, Logprob, RequestMetrics, TokenLogprobs
from paged.request import Request


class OutputProcessor:
    """The presentation of one request (one completion of it), from its first token to its last."""

    def __init__(self, request: Request, public_id: str, tokenizer: Any):
        self.request, self.public_id, self.tokenizer = request, public_id, tokenizer
        params = request.sampling_params
        self.detokenizer = (
            IncrementalDetokenizer(tokenizer, params, request.prompt_token_ids)
            if tokenizer and params.detokenize
            else None
        )
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> tuple[CompletionDelta, str | None]:
        """The delta that this token makes, and the stop string that it completes."""
        request = self.request
        text, stop_string = self._detokenize(token_id)
        first = len(request.output_token_ids) == 1
        delta = CompletionDelta(
            request_id=self.public_id,
            index=request.index,
            text=text,
            token_ids=[token_id],
            logprobs=None if logprobs is None else [logprobs],
            finish_reason="stop" if stop_string is not None else request.finish_reason,
            stop_reason=stop_string if stop_string is not None else request.stop_reason,
            num_cached_tokens=request.num_cached_tokens,
            prompt_logprobs=self.prompt_logprobs if first else None,
            metrics=metrics_of(request) if request.finished or stop_string is not None else None,
        )
        return delta, stop_string

    def _detokenize(self, token_id: int) -> tuple[str, str | None]:
        """The text that the token adds, and the stop string it completes. A token that ends the request is no text,
        unless include_stop_str_in_output."""
        request = self.request
        if self.detokenizer is None:
            return "", None
        text, stop_string = "", None
        if request.finish_reason != "stop" or request.sampling_params.include_stop_str_in_output:
            text, stop_string = self.detokenizer.append([token_id])
        if request.finished and stop_string is None:
            text += self.detokenizer.finish()
        return text, stop_string

    def end(self, error: str) -> CompletionDelta:
        """The delta of a request that ends without a token."""
        request = self.request
        return CompletionDelta(
            request_id=self.public_id,
            index=request.index,
            text="",
            token_ids=[],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=request.num_cached_tokens,
            error=error,
            metrics=metrics_of(request),
        )

    def add_prompt_logprobs(self, positions: range, scores: Any) -> None:
        """Scores of the prompt tokens at `positions`, a row each; those already known (a preempted prompt is computed
        twice) are passed over. scores: a SampleOutput of numpy arrays."""
        known, wanted = self.prompt_logprobs, self.request.sampling_params.prompt_logprobs
        if known is None or wanted is None:
            return
        for row, position in enumerate(positions):
            if position == len(known):
                known.append(self.logprobs_of(self.request.prompt_token_ids[position], scores, row, wanted))

    def logprobs_of(self, token_id: int, scores: Any, row: int, wanted: int) -> TokenLogprobs:
        """The chosen token first, then the `wanted` most likely. scores: a SampleOutput of numpy arrays."""
        chosen = Logprob(float(scores.logprobs[row]), int(scores.rank[row]), self._text_of(token_id))
        top = zip(scores.top_ids[row, :wanted], scores.top_logprobs[row, :wanted], strict=True)
        others = {int(t): Logprob(float(p), i, self._text_of(int(t))) for i, (t, p) in enumerate(top, start=1)}
        return {token_id: chosen} | {t: p for t, p in others.items() if t != token_id}

    def _text_of(self, token_id: int) -> str | None:
        return self.tokenizer.decode([token_id]) if self.tokenizer else None


def to_host(output: Any) -> Any:
    """A pytree of device arrays as numpy, once the copies that execute() started have arrived."""
    return jax.tree.map(np.asarray, output)


def metrics_of(request: Request) -> RequestMetrics:
    return RequestMetrics(
        arrival_time=request.arrival_time,
        first_scheduled_time=request.first_scheduled_time,
        first_token_time=request.first_token_time,
        last_token_time=request.last_token_time,
        num_preemptions=request.num_preemptions,
    )
