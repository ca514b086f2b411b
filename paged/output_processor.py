"""From a completion's tokens to what its caller sees: text, stop strings, logprobs. It needs no engine for it."""

from collections.abc import Sequence
from typing import Any

from paged.detokenizer import IncrementalDetokenizer
from paged.outputs import CompletionDelta, Logprob, TokenDelta, TokenLogprobs, TokenScores
from paged.sampling_params import SamplingParams


class OutputProcessor:
    """The presentation of one completion, from its first token to its last.

    stop_string: the one that ended it, which only who reads the text can find: the engine has to be told.
    """

    def __init__(
        self, request_id: str, index: int, params: SamplingParams, tokenizer: Any, prompt_token_ids: Sequence[int]
    ):
        self.request_id, self.index, self.tokenizer = request_id, index, tokenizer
        self.stop_string: str | None = None
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, params, prompt_token_ids) if tokenizer and params.detokenize else None
        )
        self._include_stop = params.include_stop_str_in_output
        self._num_cached_tokens = 0

    def extend(self, token_ids: list[int]) -> CompletionDelta:
        """Of tokens that are neither the first nor the last, and have no logprobs: nearly all there are."""
        text, token_ids = self._read(token_ids)
        if self.stop_string is not None:
            return self._presented(text, token_ids, TokenDelta(token_ids))
        return CompletionDelta(self.request_id, self.index, text, token_ids, num_cached_tokens=self._num_cached_tokens)

    def process(self, delta: TokenDelta) -> CompletionDelta:
        """Any delta. A token that ends the request is no text, unless include_stop_str_in_output."""
        if delta.num_cached_tokens is not None:
            self._num_cached_tokens = delta.num_cached_tokens
        token_ids, text = delta.token_ids, ""
        if delta.finish_reason != "stop" or self._include_stop:
            text, token_ids = self._read(token_ids)
        is_last = delta.finish_reason is not None and delta.error is None
        if self.stop_string is None and self._detokenizer is not None and is_last:
            text += self._detokenizer.finish()
        return self._presented(text, token_ids, delta)

    def _presented(self, text: str, token_ids: list[int], delta: TokenDelta) -> CompletionDelta:
        """The delta, which reads as `text`; the last one where that ends with a stop string."""
        stopped = self.stop_string is not None
        return CompletionDelta(
            self.request_id,
            self.index,
            text,
            token_ids,
            logprobs=self._logprobs(delta.scores),
            finish_reason="stop" if stopped else delta.finish_reason,
            stop_reason=self.stop_string if stopped else delta.stop_reason,
            num_cached_tokens=self._num_cached_tokens,
            prompt_logprobs=self._logprobs(delta.prompt_scores),
            error=None if stopped else delta.error,
            metrics=delta.metrics,
        )

    def _read(self, token_ids: list[int]) -> tuple[str, list[int]]:
        """The text of the tokens, and those of them that come before the end of a stop string."""
        if self._detokenizer is None:
            return "", token_ids
        text = ""
        for count, token_id in enumerate(token_ids, start=1):
            added, self.stop_string = self._detokenizer.append((token_id,))
            text += added
            if self.stop_string is not None:
                return text, token_ids[:count]
        return text, token_ids

    def _logprobs(self, scores: Any) -> Any:
        """Of each position; None stays None."""
        return None if scores is None else [None if s is None else self._of_position(s) for s in scores]

    def _of_position(self, scores: TokenScores) -> TokenLogprobs:
        """The chosen token first, then the most likely."""
        token_id = scores.token_id
        top = enumerate(zip(scores.top_ids, scores.top_logprobs, strict=True), start=1)
        others = {t: Logprob(p, rank, self._text_of(t)) for rank, (t, p) in top if t != token_id}
        return {token_id: Logprob(scores.logprob, scores.rank, self._text_of(token_id))} | others

    def _text_of(self, token_id: int) -> str | None:
        return self.tokenizer.decode([token_id]) if self.tokenizer else None
