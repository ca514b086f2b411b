"""How to sample one request: names, defaults and rules as in vLLM, validated on construction."""

import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NoReturn

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
        (CTRL, arXiv 1909.05858), > 0; in [1e-20, 1e20] so that float32 logits stay finite.
      temperature: divides the logits, in [0, 2]; below 1e-5 means greedy, and top_p, top_k, min_p are ignored.
      top_p: smallest set of tokens with at least this probability mass, in (0, 1] (arXiv 1904.09751).
      top_k: this many most likely tokens; 0 or -1 is off. Ties at the edge are all kept.
      min_p: tokens with at least this fraction of the top probability, in [0, 1] (arXiv 2407.01082).
      seed: 64-bit integer, signed or unsigned, that makes the sampled noise a function of (seed, position,
        token id) alone; None or -1 draws one.
      stop: strings that end the generation; not part of the text unless include_stop_str_in_output. A tuple
        once constructed.
      stop_token_ids: tokens that end it, beside the model's end-of-sequence tokens. A tuple once constructed.
      ignore_eos: generate past the end-of-sequence tokens.
      max_tokens: most tokens to generate; None means up to the context length.
      min_tokens: end-of-sequence and stop tokens are forbidden before this many tokens, and stop strings are
        not looked for.
      logprobs: report this many most likely tokens (-1 is all that the engine allows) beside the chosen one.
      prompt_logprobs: the same for every prompt token but the first.
      detokenize: produce text; off, only token ids come back (and `stop` is refused).
      skip_special_tokens, spaces_between_special_tokens: how text is made from tokens.
      logit_bias: token id (or its decimal digits, as JSON has it) -> value in [-100, 100] added to its logit;
        at most 300 entries.
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

    def __post_init__(self) -> None:
        self._check_fields()
        if self.greedy:
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, name, off)
        self._check_combinations()

    def _check_fields(self) -> None:
        check = self._replace_by
        check("n", _integer, 1)
        check("presence_penalty", _number, -2, 2)
        check("frequency_penalty", _number, -2, 2)
        check("repetition_penalty", _number, 1e-20, 1e20)
        check("temperature", _number, 0, 2)
        check("top_p", _positive_number, 1)
        check("top_k", _top_k)
        check("min_p", _number, 0, 1)
        check("seed", _seed)
        check("stop", _stop_strings)
        check("stop_token_ids", _token_ids)
        check("min_tokens", _integer, 0)
        for name, low in (("max_tokens", 1), ("logprobs", -1), ("prompt_logprobs", -1)):
            if getattr(self, name) is not None:
                check(name, _integer, low)
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize"):
            check(name, _boolean)
        for name in ("skip_special_tokens", "spaces_between_special_tokens"):
            check(name, _boolean)
        check("logit_bias", _logit_bias)
        if self.allowed_token_ids is not None:
            check("allowed_token_ids", _token_ids)

    def _replace_by(self, name: str, checked: Callable[..., Any], *limits: float) -> None:
        object.__setattr__(self, name, checked(name, getattr(self, name), *limits))

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"is {self.min_tokens}: it must not exceed max_tokens, which is {self.max_tokens}")
        if self.stop and not self.detokenize:
            _refuse("stop", "needs text to look for strings in: set detokenize=True, or use stop_token_ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            _refuse("allowed_token_ids", "is empty, which allows no token: give at least one, or None for all")
        self._check_something_is_allowed(self.stop_token_ids or ())

    def _check_something_is_allowed(self, stop_token_ids: Collection[int]) -> None:
        if self.min_tokens and self.allowed_token_ids and set(self.allowed_token_ids) <= set(stop_token_ids):
            _refuse(
                "allowed_token_ids",
                "has only tokens that end the generation, but min_tokens forbids those at first: allow another token",
            )

    def validate_for(
        self,
        vocab_size: int,
        max_logprobs: int,
        max_model_len: int | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        """Checks what only the engine can know.

        Args:
          vocab_size: token ids are below it.
          max_logprobs: most that `logprobs` and `prompt_logprobs` may ask for.
          max_model_len: longest prompt and output together, in tokens.
          stop_token_ids: all that end this request, the model's end-of-sequence tokens among them.

        Raises:
          InvalidRequestError: a token is not in the vocabulary, or a limit of the engine is exceeded.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    _refuse(name, f"has token id {token_id}, but the model's ids are 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and asked > max_logprobs:
                _refuse(name, f"is {asked}, but this engine allows at most {max_logprobs} (its option max_logprobs)")
        if max_model_len is not None and self.min_tokens >= max_model_len:
            _refuse("min_tokens", f"is {self.min_tokens}, but prompt and output have {max_model_len} tokens at most")
        self._check_something_is_allowed(stop_token_ids)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def _refuse(param: str, message: str) -> NoReturn:
    raise InvalidRequestError(f"{param} {message}", param=param)


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python shows no integer of more than 4300 digits
        return "a number of thousands of digits"


def _number(param: str, value: Any, low: float, high: float) -> float:
    if not _is_real(value) or not low <= value <= high:  # NaN compares false
        _refuse(param, f"must be a number in [{low}, {high}], not {_shown(value)}")
    return float(value)


def _positive_number(param: str, value: Any, high: float) -> float:
    if not _is_real(value) or not 0 < value <= high:
        _refuse(param, f"must be a number in (0, {high}], not {_shown(value)}")
    return float(value)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _integer(param: str, value: Any, low: int, high: int | None = None) -> int:
    if not _is_integral(value) or value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
        _refuse(param, f"must be an integer {expected}, not {_shown(value)}")
    return int(value)


def _is_integral(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _top_k(param: str, value: Any) -> int:
    return max(_integer(param, value, -1), 0)


def _seed(param: str, value: Any) -> int | None:
    if value is None or _integer(param, value, -(2**63), 2**64 - 1) == -1:
        return None
    return int(value)


def _boolean(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(param, f"must be true or false, not {_shown(value)}")
    return value


def _token_ids(param: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        _refuse(param, f"must be a list of token ids, not {_shown(value)}")
    return tuple(_token_id(param, token_id) for token_id in value)


def _token_id(param: str, value: Any) -> int:
    if not _is_integral(value) or value < 0:
        _refuse(param, f"has {_shown(value)}: token ids are integers from 0 up")
    return int(value)


def _stop_strings(param: str, value: Any) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if isinstance(strings, bytes | Mapping) or not hasattr(strings, "__iter__"):
        _refuse(param, f"must be a string or a list of strings, not {_shown(value)}")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str):
            _refuse(param, f"has {_shown(string)}: every stop must be a string (use stop_token_ids for token ids)")
        if not string:
            _refuse(param, "has an empty string, which would end every text at once: remove it")
    return strings


def _logit_bias(param: str, value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        _refuse(param, f"must map token ids to numbers, not {_shown(value)}")
    if len(value) > MAX_LOGIT_BIAS:
        _refuse(param, f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    bias: dict[int, float] = {}
    for key, number in value.items():
        digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token_id = _token_id(param, int(key) if digits else key)
        if token_id in bias:
            _refuse(param, f"has token id {token_id} twice")
        bias[token_id] = _number(param, number, -100, 100)
    return bias or None
