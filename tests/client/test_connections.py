"""What a connection promises: it lives as long as it is needed, keeps its revision, and says at once what is wrong."""

import contextlib
import copy
import functools
import math
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import schoolhouse as sh
import torch
from forked import in_a_fork
from schoolhouse import errors
from schoolhouse.remote import connections
from schoolhouse_server import serve
from schoolhouse_wire.executor import DaemonExecutor
from schoolhouse_wire.rpc import channel
from torch import nn


def constant(value):
    module = nn.Linear(2, 2, bias=False)
    nn.init.constant_(module.weight, value)
    return module


SERVER = """
import sys, torch
from schoolhouse_server import serve
from schoolhouse_wire.executor import DaemonExecutor
module = torch.nn.Linear(2, 2, bias=False)
torch.nn.init.constant_(module.weight, float(sys.argv[1]))
with serve(module, port=int(sys.argv[2])) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def served_elsewhere(value, port=0):
    command = [sys.executable, "-c", SERVER, str(value), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
            process.stdin.close()
            process.wait(30)
        finally:
            process.kill()


def test_copies_keep_the_revision_that_was_begun_with(kept_port):
    x = torch.ones(1, 2)
    with serve(constant(1.0), port=kept_port) as server, sh.connect(server.url) as teacher:
        settings = {"teacher_model": teacher, "criterion": nn.MSELoss()}
        model = sh.convert(nn.Linear(2, 2), mode=[("kd_loss", settings)])
        copies = [pickle.loads(pickle.dumps(teacher)), copy.deepcopy(teacher)]
        student = pickle.loads(pickle.dumps(model))
    with serve(constant(2.0), port=kept_port):
        for teacher in copies:
            with pytest.raises(errors.RevisionChangedError, match="Connect again"):
                teacher.submit((x,), {}, [""])
        with pytest.raises(errors.RevisionChangedError, match="Connect again"):
            student(x)
        with sh.connect(server.url) as anew:
            assert anew.submit((x,), {}, [""]).result()[""].tolist() == [[4, 4]]


def test_a_fork_that_closes_a_teacher_leaves_the_parents_sessions():
    x = torch.ones(1, 2)
    held, free = threading.Event(), threading.Event()

    def hold():
        dispatcher = teacher._dispatcher
        with dispatcher.outstanding._lock, dispatcher._loop._lock, connections._guard:  # as threads may
            held.set()
            free.wait(30)

    with served_elsewhere(1.0) as url, sh.connect(url) as teacher:
        teacher.submit((x,), {}, [""]).result()
        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(30)

        def close():
            teacher.close()
            return 7

        assert in_a_fork(close) == 7
        free.set()
        holder.join(30)
        assert teacher.submit((x,), {}, [""]).result(20)[""].tolist() == [[2, 2]]


def test_pings_of_a_client_that_waits_are_welcome():
    """With both intervals a hundredth of what they are; gRPC ignores options that it does not know."""
    server_options = [
        (name, value // 100 if value == channel._SERVER_MIN_PING_MS else value)
        for name, value in channel.SERVER_OPTIONS
    ]
    client_options = [
        (name, value // 100 if value == channel._CLIENT_PING_MS else value) for name, value in channel.CLIENT_OPTIONS
    ]
    assert channel._SERVER_MIN_PING_MS < channel._CLIENT_PING_MS
    handler = grpc.unary_unary_rpc_method_handler(lambda *_: (time.sleep(2), b"done")[1])
    server = grpc.server(ThreadPoolExecutor(2), options=server_options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Slow", {"Call": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=client_options) as opened:
        assert opened.unary_unary("/test.Slow/Call")(b"", timeout=30) == b"done"
    server.stop(0).wait()


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "raise ValueError('as scripts do')"])
def test_a_script_that_ends_without_close_ends(ending):
    script = f"""
import torch, schoolhouse as sh
from schoolhouse_server import serve
from schoolhouse_wire.executor import DaemonExecutor
server = serve(torch.nn.Linear(2, 2))
teacher = sh.connect(server.url)
teacher.submit((torch.ones(1, 2),), {{}}, [""]).result()
futures = [teacher.submit((torch.ones(100_000, 2),), {{}}, [""]) for _ in range(50)]
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150)
    assert done.returncode == (3 if "SystemExit" in ending else 1)
    assert ("as scripts do" in done.stderr) == ("ValueError" in ending)


WRONG_URLS = [
    "grpc://[::1/x",
    "grpc://h:abc/x",
    "grpc://h:99999/x",
    "grpc://h:-1/x",
    "grpc://h/x",
    "http://h:1/x",
    "h:1/x",
]


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_address_is_refused_at_once(url):
    with pytest.raises(errors.ConfigError, match="teacher_model.*grpc://HOST:PORT/NAME"):
        sh.connect(url)


@pytest.mark.parametrize(
    ("group", "setting"),
    [
        (sh.Timeouts, {"request_s": 0}),
        (sh.Timeouts, {"request_s": math.nan}),
        (sh.Timeouts, {"request_s": "1"}),
        (sh.Timeouts, {"connect_s": math.inf}),
        (sh.Timeouts, {"connect_s": None}),
        (sh.Timeouts, {"teacher_s": 0}),
        (sh.Timeouts, {"attempt_s": "1"}),
        (sh.Sharing, {"max_pending": -1}),
        (functools.partial(sh.connect, "grpc://127.0.0.1:1/x"), {"job": 5}),
        (sh.Sharing, {"weight": 0.001}),
        (sh.Security, {"insecure": 1}),
        (sh.Transport, {"shared_memory": 1}),
        (sh.Transport, {"checksums": None}),
        (sh.Transport, {"tune_allocator": "no"}),
    ],
)
def test_a_wrong_setting_is_refused_where_its_group_is_made(group, setting):
    [(name, value)] = setting.items()
    with pytest.raises(errors.ConfigError, match=f"{name} is {value!r}; "):
        group(**setting)


@pytest.mark.parametrize("name", ["timeouts", "sharing", "security", "transport"])
def test_what_is_no_group_is_refused_and_not_shown(name):
    with pytest.raises(errors.ConfigError) as refused:
        sh.connect("grpc://127.0.0.1:1/x", **{name: {"token": "hidden"}})
    assert str(refused.value) == f"{name} is a dict; choices: {name.title()}(...)"


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"timeout_s": 1}, "connect() has no timeout_s; write timeouts=Timeouts(request_s=...)"),
        ({"connect_timeout_s": 1}, "connect() has no connect_timeout_s; write timeouts=Timeouts(connect_s=...)"),
        (
            {"token": "hidden", "teacher_timeout_s": 1, "weight": 2, "attempt_timeout_s": 2},
            "connect() has no token and no teacher_timeout_s and no weight and no attempt_timeout_s; write "
            "timeouts=Timeouts(teacher_s=..., attempt_s=...) and sharing=Sharing(weight=...) and "
            "security=Security(token=...)",
        ),
        (
            {"verify_every": 1, "verify_tolerance": 0.1},
            "connect() has no verify_every and no verify_tolerance; write "
            "VerifiedTeacher(connect(...), every=..., tolerance=...)",
        ),
        *(
            ({name: None}, f"connect() has no {name}; write {group.lower()}={group}({name}=...)")
            for group, names in {
                "Sharing": ("weight", "max_pending"),
                "Security": ("ca", "cert", "key", "token", "insecure"),
                "Transport": ("shared_memory", "checksums", "tune_allocator"),
            }.items()
            for name in names
        ),
    ],
)
def test_a_name_from_before_the_groups_is_refused_with_what_to_write(flat, says):
    for make in (sh.connect, sh.RemoteTeacher):
        with pytest.raises(TypeError) as refused:
            make("grpc://127.0.0.1:1/x", **flat)
        assert str(refused.value) == says


def test_an_unknown_setting_is_refused_with_those_there_are():
    with pytest.raises(TypeError, match=r"no timeout; choices: job, sharing, timeouts, security, .*, follow_revisions"):
        sh.connect("grpc://127.0.0.1:1/x", timeout=1)


def test_an_executor_runs_all_that_it_is_given_and_ends():
    executor = DaemonExecutor(3, "test-executor")
    gate = threading.Event()
    futures = [executor.submit(lambda i=i: (gate.wait(30), i)[1]) for i in range(10)]
    failing = executor.submit(lambda: 1 / 0)
    running = [thread for thread in threading.enumerate() if thread.name.startswith("test-executor")]
    assert len(running) == 3
    assert futures[-1].cancel()
    gate.set()
    assert [future.result(30) for future in futures[:-1]] == list(range(9))
    with pytest.raises(ZeroDivisionError):
        failing.result(30)
    executor.shutdown()
    for thread in running:
        thread.join(30)
    assert not any(thread.is_alive() for thread in running)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)
