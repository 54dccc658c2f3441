"""A keeper whose thread ends by an error."""

from pathlib import Path

from schoolhouse_server.keeper import KeeperActor


class KeeperThatFailsOnce(KeeperActor):
    """Fails while there is a file beside the pool's, which it removes first."""

    def __init__(self, pool, directory):
        self._flag = Path(pool.folder) / "fail-once"
        super().__init__(pool, directory)

    def _keep(self):
        if self._flag.exists():
            self._flag.unlink()
            raise MemoryError
        super()._keep()
