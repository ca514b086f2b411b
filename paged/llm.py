"""The engine in a notebook or a script: a list of prompts in, a list of results out."""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from paged.chat import Message, render_chat
from paged.config import EngineConfig
from paged.engine import Engine
from paged.errors import InvalidRequestError, QueueFullError
from paged.outputs import CompletionDelta, CompletionOutput, RequestOutput
from paged.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A model, ready to generate.

        llm = LLM()
        llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text

    Keywords are the fields of paged.config's dataclasses (model=, dtype=, max_model_len=, max_num_seqs=, ...).

    Raises:
      InvalidRequestError: an option does not fit the model or the machine.
    """

    def __init__(self, model: str | None = None, **kwargs: Any):
        if model is not None:
            kwargs["model"] = model
        self.engine = Engine(EngineConfig.from_kwargs(**kwargs))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; results are in the order of the prompts.

        Args:
          prompts: one prompt or a list: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
          sampling_params: one for all, or one a prompt; none: the model's own defaults.
          priority: one number a prompt, lower first; for scheduling_policy="priority".

        Raises:
          InvalidRequestError: a prompt or parameter is invalid; nothing has run then.

        A request that a failing step took down has finish_reason "error" and the error as its stop_reason.
        """
        texts, token_ids = self._tokenize(as_list(prompts))
        params = self._params_for(len(token_ids), sampling_params)
        if priority is not None and len(priority) != len(token_ids):
            raise InvalidRequestError(f"{len(priority)} priorities for {len(token_ids)} prompts", param="priority")
        outputs = [
            RequestOutput(str(next(self._ids)), text, ids, [CompletionOutput(i, "", []) for i in range(p.n)])
            for text, ids, p in zip(texts, token_ids, params, strict=True)
        ]
        for output, p in zip(outputs, params, strict=True):
            self.engine.validate(output.request_id, output.prompt_token_ids, p)
        queue = zip(outputs, params, priority or [0] * len(outputs), strict=True)
        try:
            self._run(outputs, queue, use_tqdm)
        except BaseException:
            for output in outputs:
                self.engine.abort(output.request_id)
            raise
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them, through the model's chat template."""
        if not messages:
            raise InvalidRequestError("messages must be a list with at least one message", param="messages")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [
            render_chat(
                self.engine.tokenizer,
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None with skip_tokenizer_init."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**self.engine.default_sampling_params)

    def _tokenize(self, prompts: list[Prompt]) -> tuple[list[str | None], list[list[int]]]:
        texts: list[str | None] = []
        token_ids: list[list[int]] = []
        for prompt in prompts:
            content: Any = prompt
            if isinstance(prompt, Mapping):
                content = prompt.get("prompt_token_ids", prompt.get("prompt"))
            if isinstance(content, str):
                if self.engine.tokenizer is None:
                    raise InvalidRequestError("there is no tokenizer: give token ids instead of text", param="prompt")
                texts.append(content)
                token_ids.append(self.engine.tokenizer.encode(content))
            elif isinstance(content, Sequence) and all(isinstance(t, int) for t in content):
                texts.append(None)
                token_ids.append(list(content))
            else:
                raise InvalidRequestError(
                    "a prompt is text, a list of token ids, or a dict with prompt or prompt_token_ids", param="prompt"
                )
        return texts, token_ids

    def _params_for(self, count: int, params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise InvalidRequestError(f"{len(params)} sampling_params for {count} prompts", param="sampling_params")
        return list(params)

    def _run(self, outputs: list[RequestOutput], queue: Iterable, use_tqdm: bool) -> None:
        """Feeds the engine as its queue has room, until everything is finished."""
        by_id = {output.request_id: output for output in outputs}
        unfinished = {output.request_id: len(output.outputs) for output in outputs}
        waiting = deque(queue)
        with tqdm(total=len(outputs), desc="generate", unit="request", disable=not use_tqdm) as progress:
            while unfinished:
                self._feed(waiting)
                for delta in self.engine.step():
                    output = by_id[delta.request_id]
                    extend(output, delta)
                    if delta.finish_reason is not None:
                        unfinished[delta.request_id] -= 1
                        if not unfinished[delta.request_id]:
                            del unfinished[delta.request_id]
                            output.finished = True
                            progress.update()

    def _feed(self, waiting: deque) -> None:
        """Queues requests in order for as long as the engine takes them."""
        while waiting:
            output, params, priority = waiting[0]
            try:
                self.engine.add_request(output.request_id, output.prompt_token_ids, params, priority=priority)
            except QueueFullError:
                return
            waiting.popleft()


def extend(output: RequestOutput, delta: CompletionDelta) -> None:
    """Adds a delta to the result it belongs to."""
    completion = output.outputs[delta.index]
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
    if delta.error is not None:
        logger.error("request %s failed: %s", delta.request_id, delta.error)
        completion.stop_reason = delta.error
    if delta.logprobs is not None:
        completion.logprobs = (completion.logprobs or []) + delta.logprobs
        chosen = (positions[t].logprob for t, positions in zip(delta.token_ids, delta.logprobs, strict=True))
        completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + sum(chosen)
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = delta.prompt_logprobs
    if delta.index == 0:
        output.num_cached_tokens = delta.num_cached_tokens
        output.metrics = delta.metrics


def as_list(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them, as a list."""
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)
