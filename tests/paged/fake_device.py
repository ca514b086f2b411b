"""A device that computes no model but remembers exactly what is in every cell of its cache."""

from dataclasses import dataclass, field

from paged.outputs import FinishReason
from paged.plan import ScheduledRequest, StepPlan
from paged.request import Request
from paged.sampling_params import SamplingParams
from paged.scheduler import KV_CACHE_FULL, Scheduler

VOCABULARY = 11


def make_request(
    name: str, prompt: list[int], *, max_tokens: int = 8, arrival: float = 0.0, n: int = 1, **fields
) -> Request:
    params = fields.pop("params", None) or SamplingParams(max_tokens=max_tokens)
    members = [
        Request(
            f"{name}#{i}" if i else name,
            prompt,
            params,
            arrival,
            max_total_tokens=len(prompt) + max_tokens,
            seed=i,
            index=i,
            **fields,
        )
        for i in range(n)
    ]
    members[0].siblings.extend(members[1:])
    return members[0]


@dataclass
class Truth:
    """All that a request will ever be, from itself alone: its tokens, and for each position the state that the
    cache must hold there, which depends on the whole prefix and on who may share it."""

    tokens: list[int]
    states: list[int]
    seed: int

    @classmethod
    def of(cls, request: Request, owner: int) -> "Truth":
        truth = cls([], [hash((owner,))], request.seed)
        for token in request.prompt_token_ids:
            truth.extend(token)
        return truth

    def extend(self, token: int) -> None:
        self.tokens.append(token)
        self.states.append(hash((self.states[-1], token)))

    def token(self, position: int) -> int:
        while len(self.tokens) <= position:
            self.extend(hash((self.states[-1], self.seed, 0)) % VOCABULARY)
        return self.tokens[position]

    def state(self, position: int) -> int:
        self.token(position)
        return self.states[position + 1]

    def ending(self, request: Request, capacity: int) -> tuple[list[int], FinishReason, int | str | None]:
        """Output, finish_reason and stop_reason of the request if nobody cancels it."""
        prompt, params = request.num_prompt_tokens, request.sampling_params
        for end in range(prompt + 1, capacity + 2):
            token = self.token(end - 1)
            output = self.tokens[prompt:end]
            if token in request.stop_token_ids and len(output) >= params.min_tokens:
                return output, "stop", token if token in (params.stop_token_ids or ()) else None
            if end == request.max_total_tokens:
                return output, "length", None
        return output, "length", KV_CACHE_FULL


@dataclass
class FakeDevice:
    """Runs plans, and fails where a plan would have it read a cell that does not hold what it should."""

    scheduler: Scheduler
    cells: dict[tuple[int, int], int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)  # by slot, as it has been told
    last_tokens: dict[int, int] = field(default_factory=dict)  # by slot
    truths: dict[Request, Truth] = field(default_factory=dict)
    furthest: dict[Request, int] = field(default_factory=dict)  # tokens once in the cache for a request
    computed: dict[Request, set[int]] = field(default_factory=dict)  # positions
    num_recomputed: int = 0

    def expect(self, request: Request, owner: int) -> None:
        """Requests of one owner may share blocks."""
        self.truths[request] = Truth.of(request, owner)

    def run(self, plan: StepPlan) -> list[tuple[Request, int]]:
        """The sampled token of every request that samples."""
        for request in plan.admitted:
            self.tables[request.slot] = list(request.block_table)
        for item in plan.scheduled:
            if item.new_block:
                self.tables[item.request.slot].append(item.new_block)
            assert self.tables[item.request.slot] == item.request.block_table
        for item in plan.decodes:
            assert [self.last_tokens[item.request.slot]] == self._input(item)
        for item in plan.prefills:
            assert item.request.token_slice(item.start, item.start + item.num_tokens) == self._input(item)
        for item in plan.scheduled:
            self._check_prefix(item)
        return [sampled for item in plan.scheduled for sampled in self._compute(item)]

    def spoil(self, request: Request) -> None:
        """What a step that failed may do to the blocks that the request has for itself."""
        for block in request.block_table:
            if self.scheduler.pool.references(block) == 1:
                self.cells.update({(block, offset): -1 for offset in range(self.scheduler.block_size)})

    def _cell(self, request: Request, position: int) -> tuple[int, int]:
        size = self.scheduler.block_size
        return self.tables[request.slot][position // size], position % size

    def _input(self, item: ScheduledRequest) -> list[int]:
        return [self.truths[item.request].token(item.start + i) for i in range(item.num_tokens)]

    def _check_prefix(self, item: ScheduledRequest) -> None:
        """What was computed by steps before this one."""
        truth = self.truths[item.request]
        for position in range(item.start):
            assert self.cells.get(self._cell(item.request, position)) == truth.state(position)

    def _compute(self, item: ScheduledRequest) -> list[tuple[Request, int]]:
        request, truth, end = item.request, self.truths[item.request], item.start + item.num_tokens
        for position in range(item.start, end):
            block, offset = self._cell(request, position)
            assert block != 0
            assert self.scheduler.pool.references(block) == 1, "a shared block is written"
            self.cells[block, offset] = truth.state(position)
        self.computed.setdefault(request, set()).update(range(item.start, end))
        if item.samples and request.sampling_params.prompt_logprobs is not None:
            assert self.computed[request].issuperset(range(request.num_prompt_tokens)), "logprobs are missing"
        furthest = self.furthest.get(request, 0)
        self.num_recomputed += max(0, min(end, furthest) - item.start)
        self.furthest[request] = max(furthest, end)
        if not item.samples:
            return []
        self.last_tokens[request.slot] = truth.token(end)
        return [(request, truth.token(end))]
