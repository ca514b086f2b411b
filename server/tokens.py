"""/tokenize and /detokenize: what the model makes of a text, and back."""

from typing import Any

from paged.engine_client import TextEngine
from server.chat import plain_turn, render
from server.completions import check_token_ids
from server.errors import bad_request
from server.protocol import ChatTemplateOptions, DetokenizeRequest, TokenizeRequest
from server.service import Service


def tokenize(service: Service, engine: TextEngine, body: bytes) -> dict[str, Any]:
    request = TokenizeRequest.parse(body)
    service.check_model(request.model)
    service.check_text(engine, "prompt")
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("Give either `prompt` or `messages`.", "prompt")
    if request.messages is not None:
        if request.add_special_tokens:
            message = "`add_special_tokens` does not go with `messages`: the chat template writes the special tokens."
            raise bad_request(message, "add_special_tokens")
        turns = [plain_turn(message, f"messages.{i}") for i, message in enumerate(request.messages)]
        token_ids = render(service, engine, turns, request)
    else:
        for name in sorted(request.model_fields_set & ChatTemplateOptions.model_fields.keys()):
            raise bad_request(f"`{name}` goes with `messages`, not with `prompt`.", name)
        token_ids = engine.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    return {
        "count": len(token_ids),
        "max_model_len": engine.max_model_len,
        "tokens": token_ids,
        "token_strs": engine.tokenizer.convert_ids_to_tokens(token_ids) if request.return_token_strs else None,
    }


def detokenize(service: Service, engine: TextEngine, body: bytes) -> dict[str, Any]:
    request = DetokenizeRequest.parse(body)
    service.check_model(request.model)
    service.check_text(engine, "tokens")
    if request.tokens:
        check_token_ids(request.tokens, engine.vocab_size, "tokens")
    return {"prompt": engine.tokenizer.decode(request.tokens)}
