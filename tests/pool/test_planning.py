"""What the keeper does next, on replicas that only exist in a simulation: no step of a roll leaves students without."""

from dataclasses import replace

import pytest
from schoolhouse.errors import ConfigError, UnknownTeacherError
from schoolhouse_server.pool.config import Bounds, PoolConfig, TeacherSpec
from schoolhouse_server.pool.planning import QUIET_S, ROOM_S, Plan, Seen, plan
from schoolhouse_server.pool.pool_state import Desired


def pool(replicas=2, width=1, **settings):
    spec = TeacherSpec(build="m:f", kwargs={"width": width}, replicas=replicas)
    return PoolConfig(teachers={"net": spec}, linger_s=1000.0, **settings)


class World:
    """Replicas that start, serve and drain as a plan says. `room` is how many may exist; jobs hold revisions."""

    def __init__(self, config, room=99):
        self.desired = Desired.of(config)
        self.replicas, self.jobs, self.used, self.now, self.room, self.made = [], set(), {}, 1000.0, room, 0
        self.fewest, self.ends = {}, {}

    @property
    def state(self):
        return self.desired.teachers["net"]

    def serving(self, version=None):
        return [r for r in self.replicas if r.phase == "serving" and version in (None, r.version)]

    def step(self):
        self.now += 1.0
        for version in self.jobs:
            self.used[version] = self.now
        planned = plan(self.state, self.replicas, self.used, self.now)
        self.replicas = [replace(r, phase="draining") if r.id in planned.drain else r for r in self.replicas]
        self.replicas += [
            Seen(id=str(self.made + i), version=v.number, phase="starting", placed=False)
            for i, v in enumerate(planned.start)
        ]
        self.made += len(planned.start)
        self.ends |= dict.fromkeys(planned.drain, self.now + 3)
        self.replicas = [r for r in self.replicas if self.now < self.ends.get(r.id, self.now + 1)]
        for i, replica in enumerate(self.replicas):
            self.replicas[i] = self.older(replica)
        return planned

    def older(self, seen):
        placed = seen.placed or sum(r.placed for r in self.replicas) < self.room
        if seen.phase == "starting" and seen.placed and seen.age_s >= 2:
            self.has_started(seen.version)
            return replace(seen, phase="serving", placed=True, revision=f"r{seen.version}", age_s=seen.age_s + 1)
        return replace(seen, placed=placed, age_s=seen.age_s + 1)

    def has_started(self, number):
        state = self.state.with_version(replace(self.state.version(number), revision=f"r{number}"))
        if number == state.current.number:
            old = tuple(replace(v, superseded_at=v.superseded_at or self.now) for v in state.old)
            state = replace(state, old=old)
        self.desired = self.desired.with_teacher("net", state)

    def run(self, steps=60):
        for _ in range(steps):
            self.step()
            for version in self.jobs:
                self.fewest[version] = min(self.fewest.get(version, 99), len(self.serving(version)))
            self.fewest["all"] = min(self.fewest.get("all", 99), len(self.serving()))
            assert sum(r.placed for r in self.replicas) <= self.room
        return self


def begun(**settings):
    room = settings.pop("room", 99)
    world = World(pool(**settings), room).run(20)
    assert len(world.serving()) == world.state.count == len(world.replicas)
    world.fewest = {}
    return world


def rolled(world, **settings):
    world.desired = world.desired.rolled(pool(width=2, **settings), ["net"])
    return world.state.current.number


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_a_roll_never_has_fewer_than_were_asked_for(replicas):
    world = begun(replicas=replicas)
    new = rolled(world, replicas=replicas)
    world.run()
    assert world.fewest["all"] >= replicas
    assert [r.version for r in world.serving()] == [new] * replicas
    assert world.replicas == world.serving()


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_job_keeps_its_revision_until_it_ends(replicas):
    world = begun(replicas=replicas)
    old = world.state.current.number
    world.jobs = {old}
    new = rolled(world, replicas=replicas)
    world.run()
    assert world.fewest[old] >= 1
    assert len(world.serving(new)) == replicas
    assert len(world.serving(old)) == 1
    world.replicas = [r for r in world.replicas if r.version != old]  # its node dies
    world.fewest = {}
    world.run(5)
    assert len(world.serving(old)) == 1
    world.jobs = set()
    world.run(int(QUIET_S) + 5)
    assert world.serving(old) == []


def test_a_job_that_does_not_end_loses_its_revision_after_the_linger_time():
    world = begun(replicas=1)
    old = world.state.current.number
    world.jobs = {old}
    rolled(world, replicas=1)
    world.run(20)
    assert len(world.serving(old)) == 1
    world.now += 1000.0
    world.run(5)
    assert world.serving(old) == []


@pytest.mark.parametrize("replicas", [2, 4])
def test_without_room_for_one_more_one_old_one_goes_first(replicas):
    world = begun(replicas=replicas, room=replicas)
    new = rolled(world, replicas=replicas)
    world.run(int(ROOM_S) * 3 * replicas)
    assert world.fewest["all"] == replicas - 1
    assert [r.version for r in world.serving()] == [new] * replicas


def test_the_last_one_never_goes_first():
    world = begun(replicas=1, room=1)
    rolled(world, replicas=1)
    world.run(100)
    assert world.fewest["all"] == 1
    assert [r.version for r in world.serving()] == [0]


def test_an_equal_revision_takes_the_jobs_over():
    world = begun(replicas=2)
    world.jobs = {0}
    rolled(world, replicas=2)
    for _ in range(40):
        world.step()
        world.replicas = [replace(r, revision="same") if r.phase == "serving" else r for r in world.replicas]
        versions = [replace(v, revision="same") if v.revision else v for v in world.state.versions]
        *old, current = versions
        world.desired = world.desired.with_teacher("net", replace(world.state, current=current, old=tuple(old)))
    assert world.serving(0) == []
    assert len(world.serving()) == 2


def test_a_roll_during_a_roll():
    world = begun(replicas=2)
    world.jobs = {0}
    rolled(world, replicas=2)
    world.run(4)
    newest = rolled(world, replicas=2)
    world.run()
    assert world.fewest["all"] >= 2
    assert world.fewest[0] >= 1
    assert len(world.serving(newest)) == 2
    assert {r.version for r in world.replicas} == {0, newest}


def test_a_roll_that_was_taken_back_leaves_the_old_serving():
    world = begun(replicas=2)
    rolled(world, replicas=2)
    world.step()
    world.desired = world.desired.with_teacher("net", world.state.taken_back("no such file"))
    world.run()
    assert [r.version for r in world.replicas] == [0, 0]
    assert world.fewest["all"] == 2
    assert world.state.failed == "no such file"


def test_fewer_replicas_drain_those_that_are_missed_least():
    world = begun(replicas=3)
    world.replicas = [replace(r, sessions=i) for i, r in enumerate(world.replicas)]
    world.desired = world.desired.scaled("net", Bounds.parse("2"))
    first = world.replicas[0].id
    assert world.step() == Plan(drain=(first,))
    assert [r.sessions for r in world.serving()] == [1, 2]
    assert world.step() == Plan()


def test_what_is_desired():
    desired = Desired.of(pool(replicas=2))
    with pytest.raises(UnknownTeacherError, match="it has: net") as caught:
        desired.scaled("nets", Bounds.parse("3"))
    assert caught.value.choices == ("net",)
    scaled = desired.scaled("net", Bounds.parse("3-5"))
    assert (scaled.generation, scaled.teachers["net"].count) == (1, 3)
    assert scaled.rolled(pool(replicas=2), ["net"]).teachers["net"].bounds == Bounds(min=3, max=5)  # as `scale` said
    assert scaled.rolled(pool(replicas=1), ["net"]).teachers["net"].count == 1  # the file says something new
    with pytest.raises(ConfigError, match=r"has no teacher 'x'; it has: net"):
        scaled.rolled(pool(), ["x"])
    with pytest.raises(ConfigError, match="schoolhouse down"):
        scaled.rolled(pool(port=1234), ["net"])
    other = PoolConfig(teachers={"second": TeacherSpec(build="m:f")}, port=0)
    assert set(scaled.rolled(other, ["second"]).teachers) == {"net", "second"}


def test_replicas_of_a_node_that_is_about_to_go_are_replaced_first():
    world = begun(replicas=3)
    world.replicas = [replace(r, leaving=r.id != "0") for r in world.replicas]
    assert world.step() == Plan(start=(world.state.current,) * 2)  # both at once
    world.run()
    assert world.fewest["all"] >= 3
    assert [r.leaving for r in world.replicas] == [False] * 3


def test_one_that_is_due_drains_also_where_nothing_can_take_its_place():
    world = begun(replicas=2, room=2)
    world.replicas = [replace(r, leaving=r.id == "1") for r in world.replicas]
    world.run(int(ROOM_S) * 3)
    assert world.fewest["all"] == 2  # another one going first would make no room
    assert [r.phase for r in world.replicas] == ["serving", "serving", "starting"]
    world.replicas = [replace(r, due=r.leaving) for r in world.replicas]
    assert world.step() == Plan(drain=("1",))
    world.run(10)
    assert [r.leaving for r in world.serving()] == [False, False]


def test_one_that_does_not_serve_yet_is_started_elsewhere():
    world = World(pool(replicas=1))
    world.step()
    world.replicas = [replace(r, leaving=True) for r in world.replicas]
    assert world.step() == Plan(start=(world.state.current,), drain=("0",))


@pytest.mark.parametrize("going", [0, 1])
def test_a_job_keeps_its_revision_where_its_node_is_about_to_go(going):
    world = begun(replicas=1)
    world.jobs = {0}
    number = rolled(world, replicas=1)
    world.run()
    assert sorted(r.version for r in world.serving()) == [0, number]
    world.jobs = {0, number}
    world.replicas = [replace(r, leaving=r.version == (0, number)[going]) for r in world.replicas]
    world.fewest = {}
    world.run()
    assert world.fewest[0] >= 1
    assert world.fewest[number] >= 1
    assert sorted(r.version for r in world.replicas) == [0, number]
    assert not any(r.leaving for r in world.replicas)


def test_one_that_stays_for_a_job_takes_no_place_of_the_current_ones():
    world = begun(replicas=2)
    world.jobs = {0}
    number = rolled(world, replicas=2)
    world.run()
    world.jobs = {0, number}
    going = world.serving(number)[0].id
    world.replicas = [replace(r, leaving=r.id == going) for r in world.replicas]
    world.fewest = {}
    world.run()
    assert world.fewest == {"all": 3, 0: 1, number: 2}
    assert not any(r.leaving for r in world.replicas)
