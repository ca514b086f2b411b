"""The engine: joins the scheduler, which decides, and the runner, which computes, one step ahead of its own reading."""

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from paged.compiler import CompileCounter
from paged.config import EngineConfig
from paged.engine_client import EngineInfo
from paged.errors import InvalidRequestError
from paged.output_processor import OutputProcessor
from paged.outputs import CompletionDelta, FinishReason, RequestMetrics, StepOutput, TokenDelta, TokenScores
from paged.plan import StepPlan
from paged.request import Request, RequestStatus
from paged.runner import PackedStep, StepHandle
from paged.sampling_params import SamplingParams
from paged.startup import Parts, build
from paged.stats import FinishedRequestStats, StatsListener, StepStats

logger = logging.getLogger(__name__)
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(slots=True)
class Group:
    """What was asked as one request: n completions of one prompt."""

    completions: list[Request]
    unfinished: int
    prompt_scores: list[TokenScores | None] | None  # those known so far, if they were asked for


class Engine:
    """Requests in, deltas out, a step at a time. Not thread-safe: one thread owns it.

    A step is scheduled and dispatched before the previous one's tokens are read, so the device always has work
    queued; a request that stops on a token's value has by then one more token under way, which is thrown away.

    Whoever makes text elsewhere gives tags to its requests and calls step_outputs(); others call step().

    Args:
      parts: what to run on, instead of what `build(config)` loads and compiles.
    """

    def __init__(self, config: EngineConfig, listeners: Sequence[StatsListener] = (), parts: Parts | None = None):
        parts = parts or build(config)
        self.config, self.listeners = config, list(listeners)
        self.checkpoint, self.runner, self.scheduler = parts.checkpoint, parts.runner, parts.scheduler
        self.max_model_len, self.ledger, self.seeds = (
            parts.max_model_len,
            parts.ledger,
            random.Random(config.model.seed),
        )
        self.tokenizer = parts.checkpoint.tokenizer
        eos = (*parts.checkpoint.config.eos_token_ids, getattr(self.tokenizer, "eos_token_id", None))
        self.eos_token_ids = frozenset(token for token in eos if token is not None)
        self.compiles = CompileCounter()
        self._groups: dict[str, Group] = {}
        self._group_of: dict[Request, str] = {}  # of every completion that has not ended
        self._inflight: list[StepHandle] = []
        self._stats = StepStats()

    # ---- requests -------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        tags: Sequence[Any] | None = None,
    ) -> None:
        """Queues a request.

        Args:
          tags: what step_outputs() calls its n completions; none: their text is made here, by step().

        Raises:
          InvalidRequestError: the prompt is empty, too long, or holds ids outside the vocabulary; a parameter does
            not fit the model; the id is in use.
          QueueFullError: the queue is at its limit.
        """
        params = self.validate(request_id, prompt_token_ids, params)
        requests = self._make_requests(
            request_id, prompt_token_ids, params, priority, cache_salt, arrival_time or time.monotonic()
        )
        self.scheduler.add(requests[0])
        prompt_scores: list[TokenScores | None] | None = None if params.prompt_logprobs is None else [None]
        self._groups[request_id] = Group(requests, len(requests), prompt_scores)
        for i, request in enumerate(requests):
            self._group_of[request] = request_id
            request.tag = (
                OutputProcessor(request_id, i, params, self.tokenizer, prompt_token_ids) if tags is None else tags[i]
            )

    def validate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> SamplingParams:
        """Checks a request against the model; returns its parameters with -1 resolved."""
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is in use: choose another", param="request_id")
        check_prompt(prompt_token_ids, self.vocab_size, self.max_model_len)
        if self.tokenizer is None and params.stop_strings:
            raise InvalidRequestError("stop strings need a tokenizer: use stop_token_ids", param="stop")
        most = self.config.scheduler.max_logprobs
        params.validate_for(self.vocab_size, most, self.max_model_len, self._stop_token_ids(params))
        if params.logprobs == -1:
            params = replace(params, logprobs=most)
        return replace(params, prompt_logprobs=most) if params.prompt_logprobs == -1 else params

    @property
    def info(self) -> EngineInfo:
        """What clients elsewhere have to know."""
        return EngineInfo(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.scheduler.max_num_seqs,
            num_blocks=self.ledger.num_blocks,
            default_sampling_params=self.default_sampling_params,
        )

    @property
    def default_sampling_params(self) -> dict[str, Any]:
        """What the model's generation_config.json recommends, as keywords of SamplingParams."""
        given = self.checkpoint.generation_config
        defaults = {name: given[name] for name in RECOMMENDED if given.get(name) is not None}
        if given.get("max_new_tokens"):
            defaults["max_tokens"] = given["max_new_tokens"]
        return defaults

    @property
    def vocab_size(self) -> int:
        return self.checkpoint.config.vocab_size

    def _make_requests(self, request_id, prompt_token_ids, params, priority, cache_salt, arrival_time) -> list[Request]:
        """A leader and its siblings. Only the leader computes, and reports on, the whole prompt."""
        total = len(prompt_token_ids) + (params.max_tokens or self.max_model_len)
        seed = self.seeds.getrandbits(63) if params.seed is None else params.seed
        requests = [
            Request(
                request_id=request_id if index == 0 else f"{request_id}#{index}",
                prompt_token_ids=prompt_token_ids,
                sampling_params=params if index == 0 else replace(params, prompt_logprobs=None),
                arrival_time=arrival_time,
                max_total_tokens=min(total, self.max_model_len),
                seed=seed if index == 0 else random.Random(f"{seed}/{index}").getrandbits(63),
                stop_token_ids=self._stop_token_ids(params),
                priority=priority,
                cache_salt=cache_salt,
                index=index,
            )
            for index in range(params.n)
        ]
        requests[0].siblings.extend(requests[1:])
        return requests

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        return eos.union(params.stop_token_ids or ())

    def abort(self, request_id: str) -> None:
        """Ends a request without another delta; unknown and finished ids are fine. Its blocks are free at once."""
        if group := self._groups.get(request_id):
            for request in group.completions:
                self.scheduler.finish(request, "abort")
                self._forget(request)

    def finish(self, request_id: str, index: int, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends one completion of a request, as when a stop string was found in its text; fine if it has ended."""
        if group := self._groups.get(request_id):
            self.scheduler.finish(group.completions[index], reason, stop_reason)
            self._forget(group.completions[index])

    def unfinished_requests(self) -> list[tuple[str, Any]]:
        """Their ids, each with the tag of its first completion."""
        return [(request_id, group.completions[0].tag) for request_id, group in self._groups.items()]

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups) or bool(self._inflight)

    def close(self) -> None:
        self.compiles.close()

    # ---- steps ----------------------------------------------------------------------------------------------

    def step(self) -> list[CompletionDelta]:
        """Dispatches the next step, or a few if they are short, then reads what was dispatched before: returns what
        that added. For requests without tags."""
        deltas: list[CompletionDelta | None] = []
        for output in self.step_outputs():
            for processor, token_id in zip(output.tags, output.token_ids, strict=True):
                deltas.append(self._present(processor, TokenDelta([token_id])))
            for processor, delta in output.deltas:
                deltas.append(self._present(processor, delta))
        return [delta for delta in deltas if delta is not None]

    def _present(self, processor: OutputProcessor, delta: TokenDelta) -> CompletionDelta | None:
        """None of a completion that ended on a stop string while it had more tokens under way."""
        if processor.stop_string is not None:
            return None
        try:
            presented = processor.process(delta)
        except Exception as error:
            logger.exception("request %s failed while its output was made", processor.request_id)
            self.finish(processor.request_id, processor.index, "error")
            message = f"its output could not be made: {type(error).__name__}: {error}"
            return processor.process(TokenDelta([], finish_reason="error", error=message))
        if processor.stop_string is not None:
            self.finish(processor.request_id, processor.index, "stop", processor.stop_string)
        return presented

    def step_outputs(self) -> list[StepOutput]:
        """As step(), before the tokens are text."""
        begin = time.monotonic()
        previous, self._inflight = self._inflight, []
        behind_prompts = any(plan.prefills for handle in previous for plan in handle.plans)
        steps, failure = self._plan(most=1 if behind_prompts else self.runner.shape.chain), None
        if steps:
            try:
                self._inflight = self.runner.execute(steps)
            except Exception as error:
                failure = error
        outputs: list[StepOutput] = []
        for handle in previous:
            try:
                outputs += self._read(handle)
            except Exception as error:
                failure = failure or error
                outputs.append(self._fail_all(handle.plans, error))
        plans = [step.plan for step in steps]
        if failure is not None:
            outputs.append(self._recover(plans, failure))
        self._report(plans, begin)
        return outputs

    def _plan(self, most: int) -> list[PackedStep]:
        """The next step; while nobody waits, as many decode steps as one call runs, up to `most`: one right behind
        prompts, as they often come in bursts, and who comes next should wait for no more."""
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        steps = [first := self.runner.pack(plan)]
        length = min(most, self.runner.chain_length(first))
        while len(steps) < length and not self.scheduler.num_waiting:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            steps.append(self.runner.pack(plan, first.shape))
        return steps

    def _read(self, step: StepHandle) -> list[StepOutput]:
        """Waits for a call's tokens and hands them to their requests."""
        sampled = to_host(step.sampled)
        for request, positions, scores in step.prompt_scores:
            self._add_prompt_scores(request, positions, to_host(scores))
        now = time.monotonic()
        return [self._append(plan, step.sampled_of(i, sampled), now) for i, plan in enumerate(step.plans)]

    def _append(self, plan: StepPlan, sampled: Any, now: float) -> StepOutput:
        """Gives every request of a step its token."""
        output, tokens, append_token = StepOutput(), sampled.tokens.tolist(), self.scheduler.append_token
        tags, token_ids, latencies = output.tags, output.token_ids, self._stats.inter_token_latency
        for row, scheduled in enumerate(plan.scheduled):
            request = scheduled.request
            if not scheduled.samples or request.status is RequestStatus.FINISHED:
                continue
            token_id, previous_time = tokens[row], request.last_token_time
            if token_id < 0:
                output.deltas += self._fail(request, "the model's logits are not numbers (NaN)")
                self.runner.clear_blocks(self.scheduler.take_spoiled())
                continue
            append_token(request, token_id, now)
            self._stats.num_generation_tokens += 1
            if previous_time is None:
                self._stats.time_to_first_token.append(now - request.arrival_time)
            else:
                latencies.append(now - previous_time)
                if request.sampling_params.logprobs is None and request.status is not RequestStatus.FINISHED:
                    tags.append(request.tag)
                    token_ids.append(token_id)
                    continue
            output.deltas.append((request.tag, self._delta(request, token_id, sampled, row)))
        return output

    def _delta(self, request: Request, token_id: int, sampled: Any, row: int) -> TokenDelta:
        """Of a token that there is more to say about."""
        wanted, first = request.sampling_params.logprobs, len(request.output_token_ids) == 1
        delta = TokenDelta(
            [token_id],
            scores=None if wanted is None else [scores_of(token_id, sampled, row, wanted)],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=request.num_cached_tokens if first else None,
            prompt_scores=self._groups[self._group_of[request]].prompt_scores if first and not request.index else None,
            metrics=metrics_of(request) if request.finished else None,
        )
        if request.finished:
            self._forget(request)
        return delta

    def _add_prompt_scores(self, request: Request, positions: range, scores: Any) -> None:
        """Of the prompt tokens at `positions`, a row each; those already known (a preempted prompt is computed twice)
        are passed over. scores: a SampleOutput of numpy arrays."""
        wanted, group_id = request.sampling_params.prompt_logprobs, self._group_of.get(request)
        known = None if group_id is None else self._groups[group_id].prompt_scores
        if known is None or wanted is None:
            return
        for row, position in enumerate(positions):
            if position == len(known):
                known.append(scores_of(request.prompt_token_ids[position], scores, row, wanted))

    # ---- failures -------------------------------------------------------------------------------------------

    def _recover(self, dispatched: list[StepPlan], error: Exception) -> StepOutput:
        """A step that raised takes the donated caches with it, and the one dispatched behind it too: their requests
        end, everyone else is computed again."""
        logger.error("a step failed: its requests end with an error, the engine goes on", exc_info=error)
        output = self._fail_all(dispatched, error)
        self._inflight = []
        self.scheduler.forget_computed()
        self.runner.reset_state()
        self.scheduler.take_spoiled()  # all blocks are clear
        return output

    def _fail_all(self, plans: list[StepPlan], error: Exception) -> StepOutput:
        message = f"the engine failed in a step: {type(error).__name__}: {error}"
        requests = [s.request for plan in plans for s in plan.scheduled]
        return StepOutput(deltas=[delta for r in requests if r in self._group_of for delta in self._fail(r, message)])

    def _fail(self, request: Request, message: str) -> list[tuple[Any, TokenDelta]]:
        """Ends a request, and with a leader the siblings that wait for its prompt."""
        self.scheduler.finish(request, "error")
        ended = [r for r in (request, *request.siblings) if r.finished and r in self._group_of]
        for r in ended:
            self._forget(r)
        return [
            (r.tag, TokenDelta([], finish_reason=r.finish_reason, error=message, metrics=metrics_of(r))) for r in ended
        ]

    # ---- accounting -----------------------------------------------------------------------------------------

    def _forget(self, request: Request) -> None:
        group_id = self._group_of.pop(request, None)
        if group_id is None:
            return
        group = self._groups[group_id]
        group.unfinished -= 1
        if group.unfinished == 0:
            del self._groups[group_id]
        stats = FinishedRequestStats(
            finish_reason=request.finish_reason or "abort",
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_generation_tokens=len(request.output_token_ids),
            n=request.sampling_params.n,
            max_tokens=request.sampling_params.max_tokens,
            finish_time=time.monotonic(),
            metrics=metrics_of(request),
            index=request.index,
        )
        for listener in self.listeners:
            listener.on_finished(stats)

    def _report(self, plans: list[StepPlan], begin: float) -> None:
        if not self.listeners:
            self._stats = StepStats()
            return
        stats, self._stats = self._stats, StepStats()
        scheduler = self.scheduler
        stats.num_running, stats.num_waiting = scheduler.num_running, scheduler.num_waiting
        stats.kv_cache_usage = scheduler.usage
        stats.num_prompt_tokens = sum(s.num_tokens for plan in plans for s in plan.prefills)
        stats.num_compiles, self.compiles.count = self.compiles.count, 0
        scheduler.take_counters(stats)
        stats.step_seconds = time.monotonic() - begin
        for listener in self.listeners:
            listener.on_step(stats)


def check_prompt(prompt_token_ids: list[int], vocab_size: int, max_model_len: int) -> None:
    if not prompt_token_ids:
        raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
    if len(prompt_token_ids) >= max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(prompt_token_ids):,} tokens, and the context of {max_model_len:,} needs room for "
            "at least one more: shorten it",
            param="prompt",
        )
    if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size:
        raise InvalidRequestError(f"prompt token ids must be in [0, {vocab_size:,})", param="prompt")


def to_host(output: Any) -> Any:
    """A pytree of device arrays as numpy, once the copies that execute() started have arrived."""
    return jax.tree.map(np.asarray, output)


def scores_of(token_id: int, scores: Any, row: int, wanted: int) -> TokenScores:
    """scores: a SampleOutput of numpy arrays."""
    top_ids, top_logprobs = scores.top_ids[row, :wanted].tolist(), scores.top_logprobs[row, :wanted].tolist()
    return TokenScores(token_id, float(scores.logprobs[row]), int(scores.rank[row]), top_ids, top_logprobs)


def metrics_of(request: Request) -> RequestMetrics:
    return RequestMetrics(
        arrival_time=request.arrival_time,
        first_scheduled_time=request.first_scheduled_time,
        first_token_time=request.first_token_time,
        last_token_time=request.last_token_time,
        num_preemptions=request.num_preemptions,
    )
