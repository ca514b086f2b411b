"""Who waits, and who is next. A cancelled request leaves at once, wherever it stands."""

import heapq
from collections import OrderedDict
from typing import Protocol

from paged.request import Request


def service_key(request: Request) -> tuple[int, float, int]:
    """Smallest first: the order in which the priority policy serves requests."""
    return request.priority, request.arrival_time, request.queue_number


class RequestQueue(Protocol):
    def push(self, request: Request) -> None: ...
    def push_front(self, request: Request) -> None:
        """Puts back a request whose turn had come already."""

    def peek(self) -> Request | None:
        """The next request; None if the queue is empty."""

    def pop(self) -> Request: ...
    def discard(self, request: Request) -> bool:
        """Takes the request out for good; False if it was not here."""

    def __len__(self) -> int: ...


class FirstComeQueue:
    """First in, first out. All is O(1)."""

    def __init__(self) -> None:
        self._requests: OrderedDict[Request, None] = OrderedDict()

    def push(self, request: Request) -> None:
        self._requests[request] = None

    def push_front(self, request: Request) -> None:
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)

    def peek(self) -> Request | None:
        return next(iter(self._requests), None)

    def pop(self) -> Request:
        return self._requests.popitem(last=False)[0]

    def discard(self, request: Request) -> bool:
        return self._requests.pop(request, request) is None

    def __len__(self) -> int:
        return len(self._requests)


class PriorityQueue:
    """Smallest service_key first. O(log n); a cancelled request's entry stays in the heap until it comes up or
    such entries are the greater part."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, int], Request]] = []
        self._members: set[Request] = set()

    def push(self, request: Request) -> None:
        self._members.add(request)
        heapq.heappush(self._heap, (service_key(request), request))

    push_front = push

    def peek(self) -> Request | None:
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
        if request not in self._members:
            return False
        self._members.remove(request)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
        return True

    def __len__(self) -> int:
        return len(self._members)
