"""Who waits, and who is next. A cancelled request leaves at once, wherever it stands."""

import heapq
from collections.abc import Callable

from paged.request import Request

Rank = tuple[int, float, int]


def by_arrival(request: Request) -> Rank:
    return 0, 0.0, request.queue_number


def by_priority(request: Request) -> Rank:
    return request.priority, request.arrival_time, request.queue_number


class RequestQueue:
    """Smallest rank first; a rank is unique, and a request keeps it when it comes back after a preemption.

    O(log n). A cancelled request's entry stays in the heap until it comes up or such entries are the greater part.
    """

    def __init__(self, rank: Callable[[Request], Rank]):
        self._rank = rank
        self._heap: list[tuple[Rank, Request]] = []
        self._members: set[Request] = set()

    def push(self, request: Request) -> None:
        self._members.add(request)
        heapq.heappush(self._heap, (self._rank(request), request))

    def peek(self) -> Request | None:
        """The next request; None if the queue is empty."""
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        request = self.peek()
        if request is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        self._members.remove(request)
        return request

    def discard(self, request: Request) -> bool:
        """Takes the request out for good (it may not be pushed again); False if it was not here."""
        if request not in self._members:
            return False
        self._members.remove(request)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
        return True

    def __len__(self) -> int:
        return len(self._members)
