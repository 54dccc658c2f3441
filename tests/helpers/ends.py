"""Ends of pipes and of streams for tests, which send and hear from threads of their own."""

import asyncio
import contextlib
import functools
import queue

from schoolhouse_wire.loop import Loop
from schoolhouse_wire.same_host import pipes


class Said:
    """Messages for a stream of a plain gRPC client: iteration blocks while there is none."""

    def __init__(self):
        self._sources = queue.SimpleQueue()

    def put(self, messages):
        self._sources.put(messages)

    def close(self):
        self._sources.put(None)

    def __iter__(self):
        while (source := self._sources.get()) is not None:
            yield from source


@functools.cache
def loop():
    """The loop in which all of them live."""
    return Loop("test-ends").start()


class Ends:
    """The ends of pipes; each call may be made from a thread of its own."""

    def __init__(self, made):
        self.pipes = made

    @classmethod
    def of(cls, offer):
        return cls(pipes.open_offered(loop(), offer))

    def send(self, message):
        """Whether all of it was written."""

        async def send():
            if self.pipes._ended or self.pipes._closed:
                return False
            written = asyncio.Event()
            self.pipes.post(message, written.set)
            while not self.pipes.idle:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(written.wait(), 0.05)
            return not self.pipes._unsent

        return loop().run(send()).result(60)

    def __iter__(self):
        heard = queue.SimpleQueue()
        end = object()

        async def hear():
            try:
                await self.pipes.each(heard.put)
            except Exception as err:
                heard.put(err)
            heard.put(end)

        running = loop().run(hear())
        try:
            while (message := heard.get(timeout=60)) is not end:
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            running.cancel()

    def end(self):
        loop().ask(self.pipes.end)

    def close(self):
        loop().ask(self.pipes.close)
