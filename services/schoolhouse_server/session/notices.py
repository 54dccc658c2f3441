"""Small messages of a session to its client, such as failures: bounded, and known until the stream has taken them."""

from collections import deque
from collections.abc import Callable, Iterator

from google.protobuf.message import Message
from schoolhouse_wire.outbox import Outbox

from schoolhouse_server.session.admission import FloodError

_MAX_UNTOLD = 1024  # that a client may leave unread


class Telling:
    """Any thread may tell; `taken()` is called by the stream's thread, each time after it has taken one."""

    def __init__(self, outbox: Outbox[Message | bytes], taken: Callable[[], None]) -> None:
        self._outbox, self._taken = outbox, taken
        self._untold: deque[Message] = deque()  # only counted: sources have their own

    def __bool__(self) -> bool:
        """Whether there is something that the stream has not taken yet."""
        return bool(self._untold)

    def tell(self, message: Message, then: Callable[[], None] = lambda: None) -> None:
        """Say it. `then` is called first, but when it is known already that there is something to say."""

        def messages() -> Iterator[Message]:
            yield message
            self._untold.popleft()
            self._taken()

        self._untold.append(message)
        then()
        self._outbox.put(messages())

    def check_read(self) -> None:
        """Raises `FloodError` where the client does not read, but goes on to call."""
        if len(self._untold) > _MAX_UNTOLD:
            raise FloodError(f"calls went on although {len(self._untold)} messages to the client were not read")
