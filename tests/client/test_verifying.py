"""One request in N is computed twice and compared; where two replicas disagree, the step fails and says so."""

import contextlib
import dataclasses
import logging
import pickle
import threading
import weakref

import pytest
import schoolhouse as sh
import torch
from directories import DirectoryServer, Scale, answer, replicas, revision_of
from memfd import no_collector, soon
from models import Net, bits, converted
from schoolhouse import encodings, errors
from schoolhouse.remote.verification import difference
from schoolhouse.sparse import with_head
from schoolhouse_server import serve
from schoolhouse_server.merge.merging import Merger
from torch import nn
from torch.nn import functional as F


class Faulty(nn.Module):
    """A linear layer on a device that may flip the lowest bit of one number, from its `good` forwards on.

    How it is broken is no part of the model, so that the revision is the same.
    """

    def __init__(self, good=float("inf"), raises=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.fc = nn.Linear(8, 5)
        self.good, self.raises, self.rows = good, raises, []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def forward(self, x):
        self.entered.set()
        assert self.gate.wait(30)
        self.rows.append(len(x))
        y = self.fc(x)
        if len(self.rows) > self.good:
            if self.raises:
                raise RuntimeError("the device is broken")
            y[0, 0:1].view(torch.int32).bitwise_xor_(1)
        return y


def batch(i=0, rows=4):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(i))


def ask(teacher, i=0, **settings):
    return teacher.submit((batch(i),), {}, [""], **settings)


@contextlib.contextmanager
def pool(*modules, serving=None, every=1, tolerance=0.0):
    """Replicas that serve the modules under one directory, and a client that verifies."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serve(module, **serving or {})) for module in modules]
        directory = stack.enter_context(DirectoryServer())
        directory.publish(*servers)
        assert len({revision_of(server) for server in servers}) == 1
        teacher = sh.VerifiedTeacher(sh.connect(directory.url), every=every, tolerance=tolerance)
        yield stack.enter_context(teacher)


@pytest.mark.parametrize(("every", "verified"), [(1, 9), (3, 3), (10, 1)])
def test_one_request_in_n_is_computed_by_two_replicas(every, verified):
    one, other = Faulty(), Faulty()
    with pool(one, other, every=every) as teacher:
        for i in range(9):
            assert torch.equal(ask(teacher, i).result(20)[""], one.fc(batch(i)))
        assert teacher.verification() == sh.Verification(compared=verified)
        assert len(one.rows) + len(other.rows) == 9 + verified
        assert min(len(one.rows), len(other.rows)) >= verified


def test_a_replica_that_computes_wrongly_is_found_and_its_features_are_not_used(caplog):
    broken = Faulty(good=0)
    with pool(Faulty(), broken) as teacher:
        model = converted(nn.Sequential(nn.Linear(8, 5)), teacher, nn.MSELoss())
        model(batch())
        with pytest.raises(errors.FeatureMismatchError, match="1 of 20 numbers differ.*VerifiedTeacher.*tolerance="):
            model.compute_kd_loss()
        [record] = [record for record in caplog.records if record.name == "schoolhouse.remote.verification"]
        assert record.levelno == logging.ERROR
        assert all(session.address in record.getMessage() for session in teacher.teacher.open_sessions())
        assert "'teacher'" in record.getMessage()
        assert teacher.verification() == sh.Verification(differed=1)
        broken.good = float("inf")  # it was replaced
        model(batch())
        assert torch.equal(model.compute_kd_loss(), F.mse_loss(model[0](batch()), broken.fc(batch())))


def test_after_an_alarm_every_request_is_verified():
    with pool(Faulty(), Faulty(good=0), every=1000) as teacher:
        for i in range(5):
            assert isinstance(ask(teacher, i).exception(20), errors.FeatureMismatchError)
        assert teacher.verification().differed == 5


def test_a_forward_that_fails_at_one_replica_alone_is_an_alarm():
    with pool(Faulty(), Faulty(good=0, raises=True)) as teacher:
        found = [ask(teacher, i).exception(20) for i in range(20)]
        kinds = {type(error) for error in found}
        assert kinds == {errors.FeatureMismatchError, errors.TeacherForwardError}  # by who was asked first
        assert teacher.verification().differed == sum(isinstance(e, errors.FeatureMismatchError) for e in found)


def test_rounding_between_unlike_devices_may_be_allowed():
    with pool(Faulty(), Faulty(good=0), tolerance=1e-6) as teacher:
        for i in range(5):
            torch.testing.assert_close(ask(teacher, i).result(20)[""], Faulty().fc(batch(i)))
        assert teacher.verification() == sh.Verification(compared=5)


@pytest.mark.parametrize(
    ("change", "tolerance", "says"),
    [
        (lambda y: y, 0.0, ""),
        (lambda y: y * (1 + 1e-3), 1e-2, ""),
        (lambda y: y * (1 + 1e-3), 1e-4, "8 of 8 numbers differ"),
        (lambda y: y.index_fill(0, torch.tensor([1]), torch.nan), 0.5, "by up to inf"),
        (lambda y: y.double(), 0.5, "another structure, shape or dtype"),
        (lambda y: y[:1], 0.5, "another structure, shape or dtype"),
        (lambda y: (y, 1), 0.5, "another structure, shape or dtype"),
        (lambda y: -y, 0.5, "differ"),
    ],
)
def test_what_counts_as_a_difference(change, tolerance, says):
    value = torch.arange(1.0, 9.0).reshape(2, 4)
    tap = sh.Tap("fc")
    found = difference(
        sh.Features({tap: value}, revision="r"), sh.Features({tap: change(value)}, revision="r"), tolerance
    )
    assert (says in found) if says else not found


def test_numbers_that_are_no_floats_have_no_tolerance():
    def of(value):
        return sh.Features({sh.Tap(""): value}, revision="r")

    whole = torch.tensor([1000, 2000])
    assert "1 of 2 numbers differ" in difference(of(whole), of(whole + torch.tensor([0, 1])), 0.5)
    zeros = torch.zeros(2)
    assert "another sign" in difference(of(zeros), of(-zeros), 0.0)
    assert not difference(of(zeros), of(-zeros), 1e-6)
    nans = torch.full((2,), torch.nan)
    assert not difference(of(nans), of(nans.clone()), 0.0)


def test_a_single_replica_computes_twice_and_says_what_that_cannot_find(caplog):
    module = Faulty()
    with pool(module, serving={"cache_bytes": 1 << 20}) as teacher:
        for i in range(3):
            assert torch.equal(ask(teacher, i).result(20)[""], module.fc(batch(i)))
        assert len(module.rows) == 6  # the cache answered none of them
        assert teacher.verification() == sh.Verification(repeated=3)
        said = [record.getMessage() for record in caplog.records if "no other could answer" in record.getMessage()]
        assert len(said) == 1
        module.good = 7  # one forward, and the next is wrong
        with pytest.raises(errors.FeatureMismatchError, match="twice"):
            ask(teacher, 9).result(20)


def test_where_requests_are_merged_those_that_are_verified_are_not(monkeypatch):
    joined, join = [], Merger.join
    monkeypatch.setattr(
        Merger, "join", lambda self, jobs: joined.append([job.alone for job in jobs]) or join(self, jobs)
    )
    module = Faulty()
    with (
        serve(module, merge="same-shape") as server,
        sh.connect(server.url) as plain,
        sh.VerifiedTeacher(sh.connect(server.url), every=1) as teacher,
    ):
        module.gate.clear()
        first = ask(plain, 20)
        assert module.entered.wait(20)
        futures = [ask(teacher, 30), ask(plain, 31), ask(plain, 32), ask(teacher, 33)]
        assert soon(lambda: server.load("teacher").queued == 4)
        module.gate.set()
        for i, future in zip((20, 30, 31, 32, 33), (first, *futures), strict=True):
            torch.testing.assert_close(future.result(20)[""], module.fc(batch(i)))
        for i, future in ((30, futures[0]), (33, futures[3])):
            assert torch.equal(future.result()[""], module.fc(batch(i)))
        assert teacher.verification() == sh.Verification(repeated=2)
    assert any(len(jobs) > 1 for jobs in joined)
    assert not any(alone for jobs in joined for alone in jobs)


def test_no_other_request_stands_for_one_that_is_verified():
    module = Faulty()
    with (
        serve(module) as server,
        sh.connect(server.url) as plain,
        sh.VerifiedTeacher(sh.connect(server.url), every=1) as one,
        sh.VerifiedTeacher(sh.connect(server.url), every=1) as two,
    ):
        module.gate.clear()
        futures = [ask(plain, 9)]
        assert module.entered.wait(20)
        futures += [ask(teacher) for teacher in (plain, one, two)]
        assert soon(lambda: all(teacher.teacher._dispatcher._where for teacher in (one, two)))
        module.gate.set()
        assert all(torch.equal(future.result(20)[""], module.fc(batch())) for future in futures[1:])
        assert one.verification() == two.verification() == sh.Verification(repeated=1)
        assert len(module.rows) == 6


def test_features_of_another_revision_are_not_compared(caplog):
    with replicas(Scale(2), Scale(3)) as servers, DirectoryServer() as directory:
        directory.publish(*servers, revision=revision_of(servers[0]))
        with sh.connect(directory.url, follow_revisions=True) as remote:
            teacher, again, other = sh.VerifiedTeacher(remote, every=1), remote.begin_again, revision_of(servers[1])

            def elsewhere(first):
                first.question = dataclasses.replace(first.question, revision=other)
                return again(first)

            remote.begin_again = elsewhere
            assert answer(teacher, 5) == 10
            assert teacher.verification() == sh.Verification(unchecked=1)
            del remote.begin_again
    assert f"has the revision {revision_of(servers[1])} by now" in caplog.text


def test_what_cannot_be_verified_is_used_counted_and_told(caplog, monkeypatch):
    def full(_request):
        raise errors.TeacherBusyError("as many as max_pending allows")

    with pool(Faulty(), Faulty()) as teacher:
        monkeypatch.setattr(teacher.teacher, "begin_again", full)
        for i in range(3):
            assert torch.equal(ask(teacher, i).result(20)[""], Faulty().fc(batch(i)))
        assert teacher.verification() == sh.Verification(unchecked=3)
    said = [record.getMessage() for record in caplog.records if "could not be verified" in record.getMessage()]
    assert len(said) == 2  # the first and the second, and then ever more rarely
    assert all("max_pending" in text for text in said)


def test_a_check_goes_back_to_the_same_replica_where_the_other_is_gone():
    with serve(Faulty()) as server, DirectoryServer() as directory, serve(Faulty()) as gone:
        directory.publish(server, gone)
        gone.close()
        with sh.VerifiedTeacher(sh.connect(directory.url), every=1) as teacher:
            assert torch.equal(ask(teacher).result(20)[""], Faulty().fc(batch()))
            assert teacher.verification() == sh.Verification(repeated=1)


@pytest.mark.parametrize("computing", ["first", "second"])
def test_cancelling_frees_whichever_is_computed(computing):
    one, other = Faulty(), Faulty()
    with pool(one, other) as teacher:
        one.gate.clear()
        other.gate.clear()
        future = ask(teacher)
        assert soon(lambda: one.entered.is_set() or other.entered.is_set())
        first, second = (one, other) if one.entered.is_set() else (other, one)
        if computing == "second":
            first.gate.set()
            assert second.entered.wait(20)
        assert future.cancel()
        dispatcher = teacher.teacher._dispatcher
        assert soon(lambda: not dispatcher._where and not dispatcher.outstanding._requests)
        first.gate.set()
        second.gate.set()
        assert torch.equal(ask(teacher, 1).result(20)[""], one.fc(batch(1)))
        assert teacher.verification() == sh.Verification(compared=1)


def test_nothing_keeps_features_that_nobody_needs():
    with pool(Faulty(), Faulty()) as teacher, no_collector():
        features = ask(teacher).result(20)
        gone = weakref.ref(features[""])
        del features
        assert soon(lambda: gone() is None, collect=False)


@pytest.mark.parametrize(
    "encoding",
    [encodings.topk(3), encodings.sampled(4), encodings.int8, encodings.bf16],
    ids=["topk", "sampled", "int8", "bf16"],
)
def test_encoded_features_are_verified_too(encoding):
    with pool(Faulty(), Faulty()) as teacher:
        for i in range(3):
            teacher.submit((batch(i),), {}, ["fc"], encodings={"fc": encoding}).result(20)
        assert teacher.verification() == sh.Verification(compared=3)


def test_hidden_states_that_stand_for_logits_are_compared():
    good, broken = (
        sh.LocalTeacher(nn.Sequential(module, nn.Linear(5, 3))).submit(
            (batch(),), {}, ["1"], encodings={"1": encodings.hidden("1")}
        )
        for module in (Faulty(), Faulty(good=0))
    )
    head, same = good.result()["1"].head, good.result()
    others = sh.Features({sh.Tap("1"): with_head(broken.result()["1"].hidden, head)}, revision="")
    assert not difference(same, sh.Features({sh.Tap("1"): with_head(same["1"].hidden.clone(), head)}, revision=""), 0.0)
    assert "1 of 20 numbers differ" in difference(same, others, 0.0)


def test_a_training_that_is_verified_is_the_same_to_the_bit():
    def train(teacher):
        model = converted(Net(), teacher, {("body", "body"): nn.MSELoss()})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x in model.prefetch([(batch(i),) for i in range(6)], depth=3):
            model(*x)
            model.compute_kd_loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        return bits(sh.export(model))

    with pool(Net(seed=3), Net(seed=3), every=2) as teacher:
        assert train(teacher) == train(sh.LocalTeacher(Net(seed=3)))
        assert teacher.verification() == sh.Verification(compared=3)


def test_a_student_uses_the_wrapper_as_it_uses_the_teacher():
    module = Faulty()
    with serve(module, allow_head=True) as server, sh.connect(server.url, head_folder=None) as remote:
        teacher = sh.VerifiedTeacher(remote, every=1)
        assert isinstance(teacher, sh.Teacher)
        assert teacher.describe() == remote.describe()
        x, mask = batch().unsqueeze(0), torch.tensor([[True, False, True, True]])
        encoding = encodings.at_positions(encodings.hidden("fc"))
        found = teacher.submit((x,), {}, ["fc"], encodings={"fc": encoding}, positions=mask).result(20)["fc"]
        assert torch.equal(found.values.hidden, x[mask])
        assert teacher.verification() == sh.Verification(repeated=1)
        with pytest.raises(errors.UnknownTapError):
            teacher.submit((x,), {}, ["nothing"])
        with pickle.loads(pickle.dumps(teacher)) as copied:
            assert (
                repr(copied)
                == repr(teacher)
                == f"VerifiedTeacher(RemoteTeacher({server.url!r}), every=1, tolerance=0.0)"
            )
            assert torch.equal(ask(copied).result(20)[""], module.fc(batch()))
            assert copied.verification() == sh.Verification(repeated=1)
            assert copied.traffic().requests == 2
        with pytest.raises(errors.UsageError, match="is closed"):
            ask(copied)
        assert soon(lambda: not copied.teacher.open_sessions())


def test_only_a_teacher_behind_grpc_is_verified():
    for teacher in (
        sh.LocalTeacher(Net()),
        sh.VerifiedTeacher(sh.RemoteTeacher("grpc://127.0.0.1:1/x"), every=1),
        Net(),
    ):
        with pytest.raises(errors.ConfigError, match=rf"a {type(teacher).__name__} cannot be verified.*connect\(...\)"):
            sh.VerifiedTeacher(teacher, every=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 0},
        {"every": 1.5},
        {"every": True},
        {"tolerance": 1.0},
        {"tolerance": -0.1},
        {"tolerance": "0"},
    ],
)
def test_wrong_settings(settings):
    [(name, value)] = settings.items()
    with pytest.raises(errors.ConfigError, match=f"{name} is {value!r}; it must be"):
        sh.VerifiedTeacher(sh.RemoteTeacher("grpc://127.0.0.1:1/teacher"), **{"every": 1} | settings)
