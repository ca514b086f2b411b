"""Log probabilities in the two shapes of OpenAI's API: parallel lists for completions, objects for chat."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from paged.outputs import Logprob, TokenLogprobs

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class LogprobFormat:
    """How tokens are spelled in an answer: by their text, or as `token_id:17` (`as_token_ids`)."""

    def __init__(self, tokenizer: Any, as_token_ids: bool = False):
        self.tokenizer = tokenizer
        self.as_token_ids = as_token_ids

    def completion(self, logprobs: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offset: int) -> dict:
        """`offset` is where in the text, in characters, the first token starts. None, for the first token of a
        prompt, has no probability."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, candidates in zip(token_ids, logprobs, strict=True):
            token = self.token(token_id, candidates[token_id] if candidates else None)
            tokens.append(token)
            offsets.append(offset)
            offset += len(token)
            values.append(_finite(candidates[token_id].logprob) if candidates else None)
            tops.append(self._top_by_text(candidates) if candidates else None)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def chat(self, logprobs: Sequence[TokenLogprobs], token_ids: Sequence[int], top: int) -> dict:
        """`top`: the number of candidates asked for, or -1 for all there are."""
        content = []
        for token_id, candidates in zip(token_ids, logprobs, strict=True):
            ranked = sorted(candidates.items(), key=lambda item: -item[1].logprob)
            listed = ranked if top < 0 else ranked[:top]
            content.append(
                self._chat_token(token_id, candidates[token_id])
                | {"top_logprobs": [self._chat_token(*candidate) for candidate in listed]}
            )
        return {"content": content, "refusal": None}

    def prompt(self, logprobs: Sequence[TokenLogprobs | None]) -> list[dict | None]:
        """vLLM's `prompt_logprobs`: for each token, its candidates by token id."""
        return [
            {
                str(token_id): {
                    "logprob": _finite(candidate.logprob),
                    "rank": candidate.rank,
                    "decoded_token": self.token(token_id, candidate),
                }
                for token_id, candidate in candidates.items()
            }
            if candidates
            else None
            for candidates in logprobs
        ]

    def token(self, token_id: int, candidate: Logprob | None = None) -> str:
        if self.as_token_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        if candidate is not None and candidate.decoded_token is not None:
            return candidate.decoded_token
        return self.tokenizer.decode([token_id])

    def _top_by_text(self, candidates: TokenLogprobs) -> dict[str, float]:
        """Of tokens with one text, which are pieces of characters, the likeliest."""
        top: dict[str, float] = {}
        for token_id, candidate in candidates.items():
            top.setdefault(self.token(token_id, candidate), _finite(candidate.logprob))
        return top

    def _chat_token(self, token_id: int, candidate: Logprob) -> dict:
        text = self.token(token_id, candidate)
        return {"token": text, "logprob": _finite(candidate.logprob), "bytes": list(self._bytes(token_id, text))}

    def _bytes(self, token_id: int, text: str) -> bytes:
        """A token's own bytes, also where it is a piece of a character and its text a replacement character."""
        if "\ufffd" in text and self.tokenizer is not None:
            piece = self.tokenizer.convert_ids_to_tokens(token_id)
            if match := BYTE_TOKEN.fullmatch(piece):
                return bytes([int(match[1], 16)])
            if all(char in _byte_alphabet() for char in piece):
                return bytes(_byte_alphabet()[char] for char in piece)
        return text.encode()


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE vocabularies (GPT-2's) spell bytes: printable Latin-1 as itself, the
    others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
