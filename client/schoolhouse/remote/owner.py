"""Who opened a session, and what it is told of it."""

from typing import TYPE_CHECKING, Protocol

from schoolhouse.errors import SchoolhouseError
from schoolhouse.remote.request import Request

if TYPE_CHECKING:
    from schoolhouse.remote.session import Session


class Owner(Protocol):
    """Who opened a session; told what becomes of it in the thread that receives its answers."""

    def on_opened(self, session: "Session") -> None:
        """The replica said hello: requests may be sent."""

    def on_draining(self, session: "Session") -> None:
        """The replica is about to stop: it answers what it has, and should get nothing more."""

    def on_unavailable(self, session: "Session", request: Request, error: SchoolhouseError) -> None:
        """The replica did not take the request up, as it stops."""

    def on_wrong(self, session: "Session", request: Request, error: SchoolhouseError) -> None:
        """What came is not what the request asked for, or its bytes are others: the replica is not to be trusted."""

    def on_broken(self, session: "Session", request: Request, error: SchoolhouseError) -> None:
        """The replica failed at the request, by a fault of its own."""

    def on_loss(self, session: "Session", lost: list[Request], error: SchoolhouseError) -> None:
        """The session has ended, or never began; these requests are unanswered."""
