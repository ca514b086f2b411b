"""From token ids to text, a few tokens at a time: whole characters only, and never past a stop string."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from tokenizers.decoders import ByteLevel

from paged.sampling_params import SamplingParams

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no, or not yet a, character
Tokens = tuple[int, ...]
MAX_UNFINISHED = 4  # tokens that one character can need: UTF-8 has at most four bytes


class IncrementalDetokenizer:
    """The text of one completion.

    The deltas, joined, are what the tokenizer makes of all ids at once, up to and without (or with, by
    include_stop_str_in_output) the first stop string to be complete, and without a half character at the end.

    Args:
      prompt_token_ids: their last few decide, in tokenizers of the SentencePiece kind, whether the first word of
        the output has a space before it. Without, it has none.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ):
        self._stream = vocabulary_of(tokenizer).stream(params, prompt_token_ids)
        self._stops = [StopMatcher(stop) for stop in params.stop_strings]
        self._stop_beginnings = {stop.pattern[0] for stop in self._stops}
        self._include_stop = params.include_stop_str_in_output
        self._num_exempt_tokens = params.min_tokens
        self._held = ""  # the longest end of the text so far that may be the beginning of a stop string
        self._stopped = False

    def append(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """The text that these tokens add, and the stop string that ends it. After a stop, all is ignored.

        A stop string counts if it ends after the first min_tokens tokens, wherever it begins.
        """
        delta = ""
        for token_id in token_ids:
            self._num_exempt_tokens -= 1
            text, stop = self._scan(self._stream.step(token_id))
            delta += text
            if stop is not None:
                return delta, stop
        return delta, None

    def finish(self) -> str:
        """The text still held back, when no more tokens come."""
        held, self._held, self._stopped = self._held, "", True
        return held

    def _scan(self, text: str) -> tuple[str, str | None]:
        if self._stopped:
            return "", None
        if not self._held and self._stop_beginnings.isdisjoint(text):
            return text, None
        known = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = [stop.pattern for stop in self._stops if stop.advance(char)]
            if complete and self._num_exempt_tokens < 0:
                stop_string = max(complete, key=len)
                self._held, self._stopped = "", True
                return known[: end if self._include_stop else end - len(stop_string)], stop_string
        safe = len(known) - max(stop.matched for stop in self._stops)
        self._held = known[safe:]
        return known[:safe], None


class StopMatcher:
    """Looks for one string in characters that come one by one, each looked at once (Knuth, Morris, Pratt 1977).

    `matched` is the length of the longest end of the text so far that begins the string.
    """

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.matched = 0
        self._borders = [0]  # of each beginning of the pattern, the longest proper end that begins it too
        for char in pattern[1:]:
            self._borders.append(self._extended(self._borders[-1], char))

    def advance(self, char: str) -> bool:
        """True if the string is complete with this character."""
        self.matched = self._extended(self.matched, char)
        complete = self.matched == len(self.pattern)
        if complete:
            self.matched = self._borders[-1]
        return complete

    def _extended(self, matched: int, char: str) -> int:
        while matched and self.pattern[matched] != char:
            matched = self._borders[matched - 1]
        return matched + (self.pattern[matched] == char)


class ByteStream:
    """Decodes token by token where tokens are strings of bytes (GPT-2's kind of vocabulary): as UTF-8, of which the
    bytes of an unfinished character are held back and broken ones read as replacement characters."""

    def __init__(self, vocabulary: "Vocabulary", skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()):
        self._bytes_of = vocabulary.bytes_of
        self._skipped = vocabulary.special if skip_special_tokens else set()
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        for token_id in prompt_token_ids[-MAX_UNFINISHED:]:  # the last may have begun a character
            self.step(token_id)

    def step(self, token_id: int) -> str:
        """The text that is certain with this token and was not before."""
        return "" if token_id in self._skipped else self._decode(self._bytes_of(token_id))


class TextStream:
    """Decodes token by token in time linear in their number, holding back characters until they are whole, where
    what a token reads as depends on its neighbours (a space at the start of a text; tokens of one byte beside others).

    A token is decoded together with the few before it, and their text is taken off the front. An unfinished character
    shows as a trailing replacement character; with MAX_UNFINISHED tokens pending, the first is no part of it.
    (tokenizers' own DecodeStream waits without such a bound, which is quadratic in a run of broken bytes or of
    skipped tokens, and raises when text before the bytes changes in the light of them.)

    Bytes that are no character read as one or more replacement characters, of which a stream may have a different
    number than a decoding of the whole.
    """

    def __init__(
        self,
        vocabulary: "Vocabulary",
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
        prompt_token_ids: Sequence[int] = (),
    ):
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special if skip_special_tokens else set()
        joined = not skip_special_tokens and not spaces_between_special_tokens
        self._joined = vocabulary.added if joined else {}  # no space between two of these
        self._after_joined = False
        self._pending: Tokens = ()
        self._num_sent = 0  # characters of the pending tokens' text that were returned
        tail = prompt_token_ids[-MAX_UNFINISHED:]
        self._context: Tokens = tuple(i for i in tail if i not in self._skipped)  # what precedes the pending tokens
        self._before = vocabulary.decode(self._context).rstrip(REPLACEMENT)  # and reads like this

    def step(self, token_id: int) -> str:
        """The text that is certain with this token and was not before."""
        if token_id in self._skipped:
            return ""
        joins, self._after_joined = self._after_joined and not self._pending, token_id in self._joined
        if joins and self._after_joined:
            self._settle((token_id,))
            return self._joined[token_id]
        self._pending = (*self._pending, token_id)
        text = self._text_of(self._pending)
        whole = text.rstrip(REPLACEMENT)
        delta = whole[self._num_sent :]
        if text and whole == text:
            self._settle(self._pending)
            self._pending, self._num_sent = (), 0
        elif not text and not self._vocabulary.has(token_id):
            self._pending = self._pending[:-1]
        else:
            self._num_sent = max(self._num_sent, len(whole))
            if len(self._pending) == MAX_UNFINISHED:
                delta += self._settle_first()
        return delta

    def _settle_first(self) -> str:
        first = self._pending[:1]
        text = self._text_of(first)
        delta = text[self._num_sent :]
        self._settle(first if text else (*self._context, *first)[-MAX_UNFINISHED:])
        self._pending, self._num_sent = self._pending[1:], max(self._num_sent - len(text), 0)
        return delta

    def _text_of(self, token_ids: Tokens) -> str:
        """What the tokens read as after the context."""
        text = self._vocabulary.decode(self._context + token_ids)
        if text.startswith(self._before):
            return text[len(self._before) :]
        return self._vocabulary.decode(token_ids)  # broken bytes that spoil the context's own

    def _settle(self, context: Tokens) -> None:
        self._context, self._before = context, self._vocabulary.decode(context)


class Vocabulary:
    """What all streams of a tokenizer share."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._backend = tokenizer.backend_tokenizer
        self.added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._decode = lru_cache(maxsize=2**16)(partial(self._backend.decode, skip_special_tokens=False))
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        self.bytes_of = lru_cache(maxsize=2**16)(self._bytes)

    def stream(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> ByteStream | TextStream:
        if type(self._backend.decoder) is ByteLevel:
            return ByteStream(self, params.skip_special_tokens, prompt_token_ids)
        spaced = params.spaces_between_special_tokens
        return TextStream(self, params.skip_special_tokens, spaced, prompt_token_ids)

    def _bytes(self, token_id: int) -> bytes:
        """As a byte-level decoder has it: a token in which some character stands for no byte is text."""
        token = self._backend.id_to_token(token_id) or ""
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:
            return token.encode()

    def decode(self, token_ids: Tokens) -> str:
        return self._decode(token_ids)

    def has(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None


vocabulary_of = lru_cache(maxsize=4)(Vocabulary)
