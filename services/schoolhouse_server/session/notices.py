"""Small messages of a session to its client, such as failures, and a bound on how many may be unread."""

from collections.abc import Callable, Iterator

from google.protobuf.message import Message
from schoolhouse_wire.outbox import Outbox

from schoolhouse_server.session.admission import FloodError

_MAX_UNTOLD = 1024  # messages that a client may leave unread


class Telling:
    """Sends small messages; `taken()` is called after the stream has taken each."""

    def __init__(self, outbox: Outbox[Message | bytes], taken: Callable[[], None]) -> None:
        self._outbox, self._taken = outbox, taken
        self._untold = 0

    def __bool__(self) -> bool:
        """Whether there are messages that the stream has not taken yet."""
        return self._untold > 0

    def tell(self, message: Message, then: Callable[[], None] = lambda: None) -> None:
        """Send a message; `then` is called before it is put out, but when this object already counts it."""

        def messages() -> Iterator[Message]:
            yield message
            self._untold -= 1
            self._taken()

        self._untold += 1
        then()
        self._outbox.put(messages())

    def check_read(self) -> None:
        """Raises `FloodError` for a client that goes on calling but does not read."""
        if self._untold > _MAX_UNTOLD:
            raise FloodError(f"calls went on although {self._untold} messages to the client were not read")
