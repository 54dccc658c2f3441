"""A launcher of a pool that is killed on its way, in a process of its own."""

import os
import signal
import time


def launch(environment, address, file, when):
    """Make a pool, and `kill -9` oneself before or after the keeper is made, or as one waits for the replicas."""
    os.environ.update(environment)  # the fork server may be older than the cluster, whose token Ray reads at its import
    import ray
    from schoolhouse_server.pool import actors, config, driver

    def end(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def make(*args, **options):
        if when != "before":
            made = actors.on_the_head(*args, **options)._actor_id.hex()
            while ray._private.state.actors(made)["State"] == "DEPENDENCIES_UNREADY":  # it would end with this process
                time.sleep(0.02)
        end()

    with driver.ray_cluster(address):
        read = config.load_pool(file)
        if when == "alone":  # as a `down` that is killed leaves it
            make(actors.DirectoryActor, "directory", read, max_concurrency=4, get_if_exists=False)
        if when in ("before", "after"):
            driver.on_the_head = make
        driver.launch(read).wait(120, end)
