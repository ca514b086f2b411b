"""The requests: every field that a body may have, so that nothing in it is silently ignored.

A field is one of four things: declared below and honoured; harmless, accepted and without effect by its nature;
neutral, known to OpenAI or vLLM but not done here, so that only the values that ask for nothing are accepted;
or unknown, which is a 400 like every value of a wrong type. Null stands for an absent field everywhere.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from server.errors import bad_request, from_validation

Neutral = dict[str, tuple[tuple[Any, ...], str]]  # field -> (values that ask for nothing, what to do instead)

NO_TOOLS = "this server does not call tools; describe them in a message and parse the answer"
NO_STRUCTURE = "this server does not constrain the output's format; ask for it in the prompt and check the answer"
NO_BEAMS = "this server samples; use n with temperature"
TEXT_ONLY = "this server reads and writes text only"
FREE_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    harmless: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Neutral] = {}

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request in a body of JSON; ApiError 400 names the field that is wrong."""
        try:
            fields = from_json(body, allow_inf_nan=False)
        except ValueError as e:
            raise bad_request(f"The body is not valid JSON: {e}.", code="invalid_json") from None
        if not isinstance(fields, dict):
            raise bad_request("The body must be a JSON object.", code="invalid_json")
        fields = {name: value for name, value in fields.items() if value is not None or not cls.knows(name)}
        cls.drop_neutral(fields)
        try:
            return cls.model_validate({name: value for name, value in fields.items() if name not in cls.harmless})
        except ValidationError as e:
            raise from_validation(e) from None

    @classmethod
    def knows(cls, name: str) -> bool:
        return name in cls.model_fields or name in cls.harmless or name in cls.neutral

    @classmethod
    def drop_neutral(cls, fields: dict[str, Any]) -> None:
        for name in fields.keys() & cls.neutral.keys():
            accepted, advice = cls.neutral[name]
            if fields.pop(name) not in accepted:
                raise bad_request(f"`{name}` is not supported: {advice}.", name, "unsupported_field")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(Request):
    """What completions and chat have in common. Ranges are checked by SamplingParams, whose names these are;
    a field that is not given is filled in from the model's generation_config.json."""

    model: str | None = None

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, Any] | None = None
    allowed_token_ids: list[int] | None = None

    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    priority: int = 0
    request_id: str | None = None
    cache_salt: str | None = None

    harmless: ClassVar[frozenset[str]] = FREE_LABELS
    neutral: ClassVar[Neutral] = {
        "store": ((False,), "this server keeps no requests"),
        "service_tier": (("auto", "default"), "there is one tier; to go first, send a lower `priority`"),
        "response_format": (({"type": "text"},), NO_STRUCTURE),
        "structured_outputs": ((), NO_STRUCTURE),
        "guided_json": ((), NO_STRUCTURE),
        "guided_regex": ((), NO_STRUCTURE),
        "guided_choice": ((), NO_STRUCTURE),
        "guided_grammar": ((), NO_STRUCTURE),
        "bad_words": (([],), "use logit_bias with -100 on the tokens to avoid"),
        "use_beam_search": ((False,), NO_BEAMS),
        "length_penalty": ((1.0,), NO_BEAMS),
        "early_stopping": ((False,), NO_BEAMS),
        "logits_processors": (([],), "use logit_bias or allowed_token_ids"),
    }

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(GenerationRequest):
    """`prompt` is a text, a list of texts, a list of token ids, or a list of such lists."""

    prompt: Any
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    neutral: ClassVar[Neutral] = GenerationRequest.neutral | {
        "suffix": (("",), "this server continues a prompt but does not fill in the middle; put all of it in `prompt`"),
    }


class Message(BaseModel):
    """One turn. What a client copies from an earlier answer is accepted where it is empty."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None
    reasoning_content: None = None
    tool_calls: Any = None
    annotations: Any = None


class ChatTemplateOptions(BaseModel):
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(GenerationRequest, ChatTemplateOptions):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    neutral: ClassVar[Neutral] = GenerationRequest.neutral | {
        "tools": (([],), NO_TOOLS),
        "tool_choice": (("none", "auto"), NO_TOOLS),
        "parallel_tool_calls": ((True, False), NO_TOOLS),
        "functions": (([],), NO_TOOLS),
        "function_call": (("none", "auto"), NO_TOOLS),
        "modalities": ((["text"],), TEXT_ONLY),
        "audio": ((), TEXT_ONLY),
        "prediction": ((), "this server does not take predicted output; leave it out"),
        "moderation": ((), "this server does not moderate; leave it out"),
        "web_search_options": ((), "this server does not search; put what was found in a message"),
        "reasoning_effort": ((), "use chat_template_kwargs if the model's template has such a switch"),
        "verbosity": (("medium",), "ask for it in a message"),
        "documents": (([],), "put them in a message"),
        "prompt_cache_options": ((), "leave it out; equal prefixes are always shared, and cache_salt keeps them apart"),
        "prompt_cache_retention": (("in_memory", "in-memory"), "the cache is in memory; leave it out"),
        "chat_template": ((), "the template is set when the server starts, with --chat-template"),
        "add_special_tokens": ((False,), "the chat template writes the special tokens"),
    }

    @classmethod
    def drop_neutral(cls, fields: dict[str, Any]) -> None:
        if fields.get("tool_choice") == "none":
            fields.pop("tools", None)
        if fields.get("function_call") == "none":
            fields.pop("functions", None)
        super().drop_neutral(fields)


class TokenizeRequest(Request, ChatTemplateOptions):
    """Either a `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Request):
    model: str | None = None
    tokens: list[int]
