"""The queue before a device: which requests run next, and which together.

It is fair across jobs: deficit round robin (Shreedhar & Varghese, SIGCOMM 1995) in which a job that becomes active is
served first, until its quantum is used, as in FQ-CoDel (RFC 8290).
"""

import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, Self, TypeVar

from schoolhouse_wire.errors import TeacherBusyError

_MAX_FLOWS = 1024  # jobs that are remembered, unless more of them wait
_MAX_OFFERED = 64  # requests that one `take` offers to `fits`
_MAX_PASSED = 16  # requests of one job among these that may be passed over as they do not fit
_STEP = 1.1  # by which the quantum goes up or down with each request, so that it stays near the median of costs
_MAX_RIDDEN = 8.0  # rounds that a job can owe for requests taken along in batches that had room for them


class Queued(Protocol):
    """What the queue reads of a request, and `charged`, which it sets.

    `cost` is above 0, and an estimate. All requests of a payer, usually a job, have its present `weight`.
    """

    charged: float

    @property
    def payer(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def cost(self) -> float: ...
    @property
    def queued_at(self) -> float: ...
    @property
    def twins(self) -> "Sequence[Self]": ...


T = TypeVar("T", bound=Queued)
Room = Literal["taken", "job", "replica"]  # whether room for a request's features was taken, or whose bound is full


@dataclass(eq=False)
class _Flow(Generic[T]):
    """The waiting requests of a job, and how much cost it may be served before it is the turn of others."""

    weight: float
    deficit: float
    waiting: deque[T] = field(default_factory=deque)
    running: int = 0  # requests that were taken, and whose costs are not known yet
    listed: bool = False  # whether it is in one of the lists of jobs to be served
    blocked: bool = False  # whether its job's bound was full at its last turn

    @property
    def served_next(self) -> bool:
        return bool(self.waiting) and self.deficit > 0


class FairQueue(Generic[T]):
    """The requests that wait for the device, at most `max_queued` of them; twins count once.

    `reserve` takes room for the features of a request that is about to be taken. A job whose bound is full keeps its
    turn, and meanwhile other jobs go first. If the replica's bound is full, none goes, as a large one might wait for
    ever otherwise. `wake` makes the queue look again.

    Requests that one computation answers are `twins`. Each waits in its own job's line, so that the computation runs as
    early as the first of their turns comes: that one is taken and charged, and the others leave the queue.

    Jobs with a deficit above 0 are served in turn, one request each, and charged its cost, with which the deficit may
    fall below 0. What it has cost is told by `settle`, which corrects the charge. When no waiting job has a deficit
    above 0, all jobs get as many rounds at once as the first of them needs; a round is the job's weight times a
    quantum, which is about the median of recent costs. So the service of two jobs that both wait all the time, divided
    by their weights, differs by at most two rounds, one request of each, and what is not settled yet. A job that does
    not wait loses what is left of its deficit within two rounds, and keeps what it owes.
    """

    def __init__(self, max_queued: int, reserve: Callable[[T], Room] = lambda _request: "taken") -> None:
        self.idle = threading.Event()  # set while `take` waits, and once it returns nothing any more
        self._max_queued = max_queued
        self._reserve = reserve
        self._changed = threading.Condition()
        self._flows: dict[str, _Flow[T]] = {}
        self._new: deque[_Flow[T]] = deque()  # jobs that have just become active, which go first
        self._old: deque[_Flow[T]] = deque()
        self._again: deque[list[T]] = deque()
        self._quantum = 0.0  # 0 before the first request
        self._count = 0
        self._lacks_room = False  # whether requests wait, but none has room
        self.starves = False  # whether that is since the replica's bound is full
        self._closed = False

    def __len__(self) -> int:
        return self._count

    def oldest(self) -> float | None:
        """When the oldest waiting request was queued, without jobs that wait for room; None if none waits."""
        with self._changed:
            found = (flow.waiting[0].queued_at for flow in self._flows.values() if flow.waiting and not flow.blocked)
            return min(found, default=None)

    def put(self, request: T, *, wake: bool = True, beside: T | None = None) -> bool:
        """Add a request. Without `wake`, call `go` soon.

        A twin is added only while another one, `beside`, waits, and whether or not the queue is full, as it needs no
        forward of its own; returns False if `beside` was taken.

        Raises:
            TeacherBusyError: the queue is full.
        """
        with self._changed:
            if beside is not None and not self._waits(beside):
                return False
            if beside is None and self._count >= self._max_queued:
                raise TeacherBusyError(f"{self._max_queued} requests are queued, as many as this teacher takes")
            self._quantum = self._quantum or request.cost
            flow = self._flows.get(request.payer)
            if flow is None:
                self._forget_idle()
                flow = self._flows[request.payer] = _Flow(request.weight, request.weight * self._quantum)
                self._list(flow, self._new)
            flow.weight = request.weight
            flow.waiting.append(request)
            self._count += beside is None
            if flow.served_next:
                self._list(flow, self._old)
            self.idle.clear()
            if wake:
                self._changed.notify()
            return True

    def again(self, requests: Sequence[T]) -> bool:
        """Have a coming `take` return these requests, which were taken before, and no others; False once closed."""
        with self._changed:
            if not self._closed:
                self._again.append([*requests])
                self.idle.clear()
                self._changed.notify()
            return not self._closed

    def remove(self, request: T) -> bool:
        """Remove a request; False if it is not there, as it was taken already."""
        with self._changed:
            if removed := self._waits(request):
                self._flows[request.payer].waiting.remove(request)
                self._count -= not any(map(self._waits, request.twins))
                self._changed.notify()  # requests behind it may have room
            return removed

    def _waits(self, request: T) -> bool:
        return (flow := self._flows.get(request.payer)) is not None and request in flow.waiting

    def settle(self, request: T, cost: float) -> None:
        """Charge a request that was taken what it has cost, in place of the estimate; to be called once for each."""
        with self._changed:
            if (flow := self._flows.get(request.payer)) is None:  # closed
                return
            flow.running -= 1
            if request.charged:
                flow.deficit -= cost - request.charged
            if cost:
                self._quantum *= _STEP if cost > self._quantum else 1 / _STEP
            if flow.served_next:
                self._list(flow, self._old)
                self._changed.notify()

    def go(self) -> None:
        """Have `take` look at what was put without waking it."""
        with self._changed:
            self._changed.notify()

    def wake(self) -> bool:
        """Have `take` look again, if it waits for room, as there may be some now; returns whether it does."""
        if lacks_room := self._lacks_room:
            self.go()
        return lacks_room

    def take(
        self,
        fits: Callable[[list[T], T], bool] | None = None,
        linger: Callable[[list[T]], float] = lambda _taken: 0.0,
    ) -> list[T]:
        """Wait for a request, and take it with others that may run with it; returns [] once the queue is closed.

        `fits(taken, other)` says which may; it is asked first for requests of the job that is owed most. Each request
        is charged to its own job. While nothing else waits, `linger(taken)` says how many more seconds to wait for
        others; 0 ends the wait.
        """
        with self._changed:
            while (found := self._next() if self._count and not self._again and not self._closed else None) is None:
                if self._closed:
                    return []
                if self._again:
                    return self._again.popleft()
                self._pause(None)
            self._lacks_room = False
            flow, turns = found
            taken = [self._charge(flow)]
            if fits is not None:
                self._take_along(taken, fits)
                while not self._count and not self._closed and (pause_s := linger(taken)) > 0:
                    self._pause(pause_s)
                    self._take_along(taken, fits)
            if flow.served_next:
                self._list(flow, turns)
            return taken

    def _pause(self, at_most_s: float | None) -> None:
        self.idle.set()
        self._changed.wait(at_most_s)
        self.idle.clear()

    def close(self) -> list[T]:
        """End `take`; returns the requests that still waited."""
        with self._changed:
            self._closed = True
            left = [request for flow in self._flows.values() for request in flow.waiting]
            left += [request for requests in self._again for request in requests]
            self._flows.clear()
            self._again.clear()
            self._count = 0
            self._changed.notify_all()
            self.idle.set()
            return left

    def _list(self, flow: _Flow[T], turns: "deque[_Flow[T]]") -> None:
        if not flow.listed:
            flow.listed = True
            turns.append(flow)

    def _next(self) -> "tuple[_Flow[T], deque[_Flow[T]]] | None":
        """The job whose turn it is, and the list that it was removed from; None if no request has room."""
        self._lacks_room = True  # until one is found; first, so that no room that becomes free meanwhile is missed
        self.starves = False
        aside: list[tuple[_Flow[T], deque[_Flow[T]]]] = []  # jobs that keep their turns
        try:
            while True:
                for turns in (self._new, self._old):
                    while turns:
                        flow = turns.popleft()
                        if not flow.served_next:  # its requests were removed, or taken along, meanwhile
                            flow.listed = False
                            continue
                        room = self._reserve(flow.waiting[0])
                        flow.blocked = room == "job"
                        if room == "taken":
                            flow.listed = False
                            return flow, turns
                        aside.append((flow, turns))
                        if room == "replica":
                            self.starves = True
                            return None
                if not self._give_rounds():
                    return None
        finally:
            for flow, turns in reversed(aside):
                turns.appendleft(flow)

    def _give_rounds(self) -> bool:
        """Give all jobs as many rounds as the first waiting job needs; forget jobs that do not wait and owe nothing.

        False if no job waits for a round, because those that wait only lack room.
        """
        quantum = self._quantum
        waiting = [flow for flow in self._flows.values() if flow.waiting]
        owing = [math.floor(-flow.deficit / (flow.weight * quantum)) for flow in waiting if flow.deficit <= 0]
        if not owing:
            return False
        rounds = min(owing) + 1
        for name, flow in list(self._flows.items()):
            if not (flow.waiting or flow.running) and flow.deficit >= 0:
                del self._flows[name]
                continue
            most = flow.weight * quantum
            flow.deficit = min(flow.deficit + rounds * most, most)
            if flow.served_next:
                self._list(flow, self._old)
        return True

    def _forget_idle(self) -> None:
        """Forget jobs that do not wait, if many came and went without a round; they count as new when they return."""
        if len(self._flows) >= _MAX_FLOWS:
            self._flows = {name: flow for name, flow in self._flows.items() if flow.waiting or flow.running}

    def _charge(self, flow: _Flow[T], at: int = 0) -> T:
        request = flow.waiting[at]
        del flow.waiting[at]
        self._count -= 1
        for twin in [*request.twins]:
            if twin is not request and self._waits(twin):
                self._flows[twin.payer].waiting.remove(twin)
        request.charged = request.cost
        flow.deficit -= request.charged
        flow.running += 1
        return request

    def _take_along(self, taken: list[T], fits: Callable[[list[T], T], bool]) -> None:
        flows = [flow for flow in self._flows.values() if flow.waiting and not flow.blocked]
        owed = [(-flow.deficit / flow.weight, i, 0) for i, flow in enumerate(flows)]
        heapq.heapify(owed)
        for _ in range(_MAX_OFFERED):
            if not owed:
                return
            _, i, at = heapq.heappop(owed)
            flow = flows[i]
            if at >= len(flow.waiting):  # a twin was taken
                continue
            if fits(taken, flow.waiting[at]):
                if self._reserve(flow.waiting[at]) != "taken":
                    continue
                owing = flow.deficit
                taken.append(self._charge(flow, at))
                if owing < -_MAX_RIDDEN * flow.weight * self._quantum:
                    flow.deficit, taken[-1].charged = owing, 0.0
            else:
                at += 1
            if at < min(len(flow.waiting), _MAX_PASSED):
                heapq.heappush(owed, (-flow.deficit / flow.weight, i, at))
