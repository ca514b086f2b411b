"""What one step computes: the scheduler's decision, and all that packing and the runner need of it."""

from dataclasses import dataclass

from paged.request import Request


@dataclass(slots=True)  # not frozen: hundreds are made in every step, and freezing costs four times the time
class ScheduledRequest:
    """`num_tokens` tokens of `request`, from position `start` on, run in this step. Nobody changes it.

    new_block: the block appended to the table for this step, 0 if none (a decode needs at most one; a prompt
      gets all its blocks at admission).
    samples: the last of these tokens is the newest of the request, so the step samples its successor.
    """

    request: Request
    start: int
    num_tokens: int
    new_block: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step. `admitted` requests need their slot's arrays written before it runs. Every decode (one token,
    read on the device from the slot's last sampled token) comes before every prompt chunk."""

    admitted: list[Request]
    decodes: list[ScheduledRequest]
    prefills: list[ScheduledRequest]
    num_preempted: int = 0

    @property
    def scheduled(self) -> list[ScheduledRequest]:
        return self.decodes + self.prefills

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(s.num_tokens for s in self.prefills)
