"""A feature is what a plain hook has at the end of a whole forward, unless the user asked for less."""

import logging
from itertools import product

import pytest
import schoolhouse as sh
import torch
from merging import Asked, at_once, close, engine_of
from models import Net
from schoolhouse import encodings, errors
from schoolhouse_server import serve
from torch import nn

HOWS = ["written into", "input written into", "again", "again on its own", "by the model", "batch written into"]
TAPS = [["a"], ["a", "b"], [("a", "input"), ("b", "input")], ["d", "a"], [("", "input"), "a"], ["a", ""]]


class Wilful(nn.Module):
    """After `b`, the values of the batch decide what happens to what was there before it: `how`, or nothing."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.act, self.how = nn.ReLU(inplace=True), how

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        how = self.how if bool((x > 3).any()) else "nothing"
        if how == "written into":
            a.mul_(3)
        elif how == "input written into":
            self.act(a)
        elif how == "again":
            b = b + self.a(b)
        elif how == "again on its own":
            b = b + self.a(x + 1)
        elif how == "by the model":
            b.add_(self.b(a.neg_()))
        elif how == "batch written into":
            x.mul_(2)
        return self.d(b)


def batches():
    """Batches of which the first three change nothing, then some do. Those that do have it in every row."""
    generator = torch.Generator().manual_seed(4)
    for i, wild in enumerate((False, False, False, True, False, True, True)):
        x = torch.rand(4 + i % 2, 8, generator=generator)
        x[:, 0] += 4 * wild
        yield x


def hooked(module, taps, *args, **kwargs):
    """What plain hooks have when the forward is over, by tap."""
    seen, handles = {}, []
    for tap in taps:
        name, side = (tap, "output") if isinstance(tap, str) else tap
        inner = module.get_submodule(name)
        if side == "input":
            handles.append(inner.register_forward_pre_hook(lambda _m, given, tap=tap: seen.update({tap: given[0]})))
        else:
            handles.append(inner.register_forward_hook(lambda _m, _i, out, tap=tap: seen.update({tap: out})))
    with torch.no_grad():
        module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def tensor(value):
    """A feature, where that is the one input of a module."""
    return value if isinstance(value, torch.Tensor) else value[0]


@pytest.mark.parametrize("how", HOWS)
def test_features_are_those_of_plain_hooks_whatever_values_decide(teach, how):
    teacher, twin = teach(Wilful(how)), Wilful(how).eval()
    for taps, x in product(TAPS, batches()):
        given = x.clone()
        got = teacher.submit((given,), {}, taps).result()
        for tap, value in hooked(twin, taps, x.clone()).items():
            assert torch.equal(tensor(got[tap]), value)
        assert torch.equal(given, x)  # a student's batch is its own


@pytest.mark.parametrize("how", HOWS)
def test_merged_features_are_those_of_plain_hooks_whatever_values_decide(how):
    twin, merged = Wilful(how).eval(), 0
    with engine_of(Wilful(how)) as engine:
        for taps, x in product([["a"], ["a", ("b", "input")], ["d", "a"]], batches()):
            names = [f"inner.{tap}" if isinstance(tap, str) else (f"inner.{tap[0]}", tap[1]) for tap in taps]
            xs = [x, x.flip(0)]
            asked = [Asked(one.clone(), taps=names) for one in xs]
            merged += len(at_once(engine, *asked)) == 1
            for one, given in zip(asked, xs, strict=True):
                features = one.features
                for name, tap in zip(names, taps, strict=True):
                    close(tensor(features[name]), hooked(twin, taps, given.clone())[tap])
    assert merged >= 9


def test_a_forward_that_draws_random_numbers_for_some_values_draws_them():
    class Chance(Wilful):
        def forward(self, x):
            a = self.a(x)
            if bool((x > 3).any()):
                a.mul_(torch.rand(8))
            return self.d(a)

    teacher, twin = sh.LocalTeacher(Chance("")), Chance("").eval()
    for i, x in enumerate(batches()):
        torch.manual_seed(i)
        got = teacher.submit((x,), {}, ["a"]).result()["a"]
        after = torch.rand(1)
        torch.manual_seed(i)
        assert torch.equal(got, hooked(twin, ["a"], x)["a"])
        assert torch.equal(after, torch.rand(1))


def test_inputs_that_are_one_tensor_stay_one(teach):
    class Both(nn.Module):
        def forward(self, x, y):
            x.add_(1)
            return y * 1

    x = torch.zeros(3)
    assert teach(Both()).submit((x, x), {}, [""]).result()[""].tolist() == [1, 1, 1]
    assert x.tolist() == [0, 0, 0]


def test_an_error_after_the_last_tap_is_one_unless_the_forward_may_stop_there(teach):
    module = Net()
    module.fc = nn.Linear(3, 3)
    x = torch.randn(2, 8)
    with pytest.raises(errors.TeacherForwardError, match="early_stop=True"):
        teach(module).submit((x,), {}, ["body"]).result()
    stopping = sh.LocalTeacher(module, early_stop=True)
    for _ in range(2):
        assert stopping.submit((x,), {}, ["body"]).result()["body"].shape == (2, 16)
    with pytest.raises(errors.TeacherForwardError):
        stopping.submit((x,), {}, ["body", ""]).result()


# When it is asked for.


class Counted(Net):
    """Counts the runs of its last layer."""

    def __init__(self, inplace):
        super().__init__()
        self.act = nn.ReLU(inplace)
        self.runs = 0
        self.fc.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.runs += 1


@pytest.mark.parametrize("served", [False, True])
def test_the_forward_stops_after_its_last_tap_where_that_is_asked_for(served):
    """The first forward of a tap runs whole, and shows whether a later module writes into it."""
    module, plain, x = Counted(inplace=True), Net(), torch.randn(2, 8)
    wants = (
        (["act"], 1),
        (["act"], 0),
        (["body"], 1),
        (["body"], 1),
        (["act", "body"], 1),
        (["act"], 0),
        (["act", ""], 1),
    )

    def check(teacher):
        for taps, runs in wants:
            before = module.runs
            got = teacher.submit((x,), {}, taps).result()
            assert module.runs - before == runs
            assert all(torch.equal(got[tap], value) for tap, value in hooked(plain, taps, x).items())

    if served:
        with serve(module, early_stop=True) as server, sh.connect(server.url) as teacher:
            check(teacher)
    else:
        check(sh.LocalTeacher(module, early_stop=True))


def test_a_merged_forward_stops_too():
    module = Counted(inplace=False)
    with engine_of(module, early_stop=True) as engine:
        for n in (1, 2, 3):
            xs = [torch.rand(n, 8), torch.rand(n + 1, 8)]
            asked = [Asked(x, taps=["inner.body"]) for x in xs]
            before = module.runs
            at_once(engine, *asked)
            for one, x in zip(asked, xs, strict=True):
                close(one.features["inner.body", "output"], Net().body(x).detach())
        assert module.runs == before


# Heads, which are left out where their hidden states are asked for.


class Headed(nn.Module):
    """What happens to the hidden states, or to the head, after the head has run: `how`, by the values if `wilful`."""

    def __init__(self, how="", wilful=False):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(8, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 9))
        self.how, self.wilful, self.runs = how, wilful, 0
        self.head.register_forward_hook(self.count)

    def count(self, *_):
        self.runs += 1

    def forward(self, x):
        state = self.body(x)
        logits = self.head(state)
        if self.wilful and not bool((x > 3).any()):
            return logits
        if self.how == "written into":
            state.mul_(-3)
        elif self.how == "again":
            logits = self.head(self.body(x + 1))
        return logits


def logits_of(teacher, x, tap, *more):
    wish = {tap: encodings.hidden("head")}
    return teacher.submit((x,), {}, [tap, *more], encodings=wish).result()


@pytest.mark.parametrize("tap", ["head", ""])
@pytest.mark.parametrize("wilful", [False, True])
@pytest.mark.parametrize("how", ["", "written into", "again"])
def test_a_head_makes_the_logits_that_a_plain_hook_has(teach, how, wilful, tap):
    module, twin = Headed(how, wilful), Headed(how, wilful).eval()
    teacher = teach(module)
    for x in batches():
        got = logits_of(teacher, x, tap)[tap].dense()
        close(got, hooked(twin, [tap], x)[tap])


def test_a_head_is_left_out_but_where_it_is_held_against_the_logits(teach):
    module, x = Headed(), torch.rand(4, 8)
    teacher = teach(module)
    logits_of(teacher, x, "head")
    before = module.runs  # the head is described meanwhile
    runs = []
    for _ in range(7):
        logits_of(teacher, x, "head")
        runs.append(module.runs - before)
    assert runs == [1, 1, 2, 2, 2, 2, 3]  # with the 2nd, the 4th and the 8th


@pytest.mark.parametrize("early_stop", [False, True])
def test_beside_another_tap_a_head_is_left_out_only_where_the_forward_may_stop(early_stop):
    module, twin = Headed("written into", wilful=True), Headed("written into", wilful=True).eval()
    module.head[0].inplace = twin.head[0].inplace = False  # else it writes into what the body returned
    teacher = sh.LocalTeacher(module, early_stop=early_stop)
    calm, wild = (next(x for x in batches() if bool((x > 3).any()) == wild) for wild in (False, True))
    for _ in range(2):
        logits_of(teacher, calm, "head", "body")
    before = module.runs
    got = logits_of(teacher, calm, "head", "body")
    assert module.runs - before == (not early_stop)
    assert torch.equal(got["body"], hooked(twin, ["body"], calm)["body"])
    if not early_stop:
        got = logits_of(teacher, wild, "head", "body")
        want = hooked(twin, ["body", "head"], wild)
        assert torch.equal(got["body"], want["body"])
        close(got["head"].dense(), want["head"])


def test_a_head_that_runs_again_after_all_is_told_and_not_left_out_any_more(caplog):
    module, twin = Headed("again", wilful=True), Headed("again", wilful=True).eval()
    teacher = sh.LocalTeacher(module)
    calm, wild = (torch.rand(4, 8), torch.rand(4, 8) + 3)
    for x in (calm, calm, calm):
        close(logits_of(teacher, x, "head")["head"].dense(), hooked(twin, ["head"], x)["head"])
    with caplog.at_level(logging.WARNING):
        for x in (wild, wild, wild):  # the first of them is the 4th, which is looked at
            close(logits_of(teacher, x, "head")["head"].dense(), hooked(twin, ["head"], x)["head"])
    assert [record.message for record in caplog.records if "'head'" in record.message and "again" in record.message]
