"""What Ray knows of its nodes: which of them are about to go, and what a replica without a node waits for.

Ray's public API offers neither. The first is asked of the GCS as Ray Serve does, and the second is what `ray status`
prints. `tests/pool/test_nodes.py` checks both with the installed version of Ray; if another version does not answer,
that is logged, and the pool works without.
"""

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

_TIMEOUT_S = 5
_ROUNDED = 1e-3  # Ray rounds amounts to ten thousandths

_log = logging.getLogger(__name__)


def leaving() -> dict[str, float]:
    """The nodes that Ray drains, as after a preemption notice: when each will be gone, by its id.

    Ray places nothing on them any more. Times are on time.time()'s clock; `math.inf` stands for an unknown time.
    """
    try:
        found = _gcs(ray.get_runtime_context().gcs_address).get_draining_nodes(timeout=_TIMEOUT_S)
        return {node: deadline_ms / 1000 if deadline_ms else math.inf for node, deadline_ms in found.items()}
    except Exception as err:  # Ray's internals may raise anything
        _warn("which nodes are about to go, so replicas are replaced only once their node is gone", repr(err))
        return {}


@dataclass(frozen=True)
class Demand:
    """The requests for resources that Ray has no node for, and what its nodes have."""

    asked: tuple[Mapping[str, float], ...]
    totals: tuple[Mapping[str, float], ...]  # the resources of each node that stays
    autoscaler: str = ""  # what the autoscaler does about it

    @classmethod
    def now(cls, going: Mapping[str, float]) -> "Demand | None":
        """The present demand; `going` are the nodes that `leaving` found.

        None if Ray does not say.
        """
        try:
            return cls._now(going)
        except Exception as err:  # Ray's internals may raise anything
            _warn("what replicas without a node wait for", repr(err))
            return None

    @classmethod
    def _now(cls, going: Mapping[str, float]) -> "Demand":
        from ray.autoscaler.v2.sdk import get_cluster_status  # imported here, as another version may not have it

        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=_TIMEOUT_S)
        demands = status.resource_demands.ray_task_actor_demand
        nodes = [node for node in (*status.active_nodes, *status.idle_nodes) if node.node_id not in going]
        return cls(
            asked=tuple(one.bundle for demand in demands for one in demand.bundles_by_count),
            totals=tuple(node.total_resources() for node in nodes),
            autoscaler=_autoscaler(status),
        )

    def why(self, needs: Mapping[str, float], where: str = "") -> str:
        """Why Ray has no node for an actor that takes `needs`; empty if it has one.

        `where` says which nodes may do.
        """
        needs = {name: amount for name, amount in needs.items() if amount}
        if not any(_same(needs, bundle) for bundle in self.asked):
            return ""
        some = any(all(total.get(name, 0) >= amount for name, amount in needs.items()) for total in self.totals)
        listed = ", ".join(f"{name}: {amount:g}" for name, amount in needs.items())
        found = "no node has it free" if some else "no node of the cluster has it"
        return f"waits for {{{listed}}}{where}: {found}{self.autoscaler}"


def _same(needs: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return {*needs} == {*bundle} and all(abs(bundle[name] - needs[name]) < _ROUNDED for name in needs)


@functools.cache
def _gcs(address: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # here, as another version may not have it

    return GcsClient(address=address)


@functools.lru_cache(64)
def _warn(what: str, why: str) -> None:
    """Log it once, not each time Ray is asked."""
    _log.warning("Ray %s does not say %s: %s", ray.__version__, what, why)


def _autoscaler(status: Any) -> str:
    """What Ray's autoscaler is doing, to be appended to a sentence; empty if it does nothing or does not run."""
    coming = sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)
    failed = [launch.details for launch in status.failed_launches if launch.details]
    said = f"; Ray's autoscaler starts {coming} nodes" if coming else ""
    return said + (f"; it could not start one: {failed[-1]}" if failed else "")
