"""Nothing that runs in the background ends without whoever waits for it being told: how all of it is made."""

import ast
import logging
import re
import traceback
from pathlib import Path

import pytest
from schoolhouse_wire import background
from traps import each_error

ROOT = Path(__file__).parents[2]
OURS = [
    path
    for folder in ("client", "services", "protos")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_pb2" not in path.name
]
TASKS = (
    ".create_task",
    ".ensure_future",
    "asyncio.gather",
    ".TaskGroup",
    ".run_coroutine_threadsafe",
    ".run_in_executor",
)


def dotted(node):
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def outside(tree):
    """What starts a thread, or has one call something, and is not of the helper's making."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & {f"threading.{name}" for name in ("Thread", "Timer")}
            yield from (name for name in names if name.startswith(("_thread.", "multiprocessing", "asyncio.")))
            yield from (name for name in names if name.endswith("PoolExecutor"))
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & {"_thread", "multiprocessing"}
        elif isinstance(node, ast.ClassDef):
            yield from {dotted(base) for base in node.bases} & {"threading.Thread", "threading.Timer"}
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in ("threading.Thread", "threading.Timer") or name.endswith(("PoolExecutor", *TASKS)):
                yield name
            given = getattr(node.args[0], "func", None) if node.args else None
            if name.endswith((".add_done_callback", ".add_callback")) and dotted(given) != "background.called":
                yield name


def test_nothing_runs_in_the_background_that_the_helper_has_not_made():
    found = {path.name: names for path in OURS if (names := list(outside(ast.parse(path.read_text()))))}
    tasks = ["self.asyncio.create_task", "task.add_done_callback"]
    others = ["asyncio.run_coroutine_threadsafe", "self.asyncio.run_in_executor"]
    found["loop.py"].sort()
    assert found == {"background.py": ["threading.Thread"], "loop.py": sorted(tasks + others)}


@pytest.mark.parametrize(
    "code",
    [
        "threading.Thread(target=f).start()",
        "from threading import Thread",
        "threading.Timer(1, f)",
        "class Mine(threading.Thread): pass",
        "concurrent.futures.ThreadPoolExecutor(1)",
        "from concurrent.futures import ProcessPoolExecutor",
        "import _thread",
        "asyncio.create_task(work)",
        "loop.run_in_executor(None, f)",
        "future.add_done_callback(f)",
        "call.add_callback(end)",
    ],
)
def test_what_the_helper_has_not_made_is_found(code):
    assert list(outside(ast.parse(code)))


MADE = r"(?:background\.thread\(|Executor\(|Loop\(|\.task[(,])[^\n]*\"(schoolhouse-[a-z-]*[a-z])"


def test_the_table_has_every_thread_and_task_and_no_other():
    made = "\n".join(path.read_text() for path in OURS if path.name != "background.py")
    rows = re.findall(r"^\| (`schoolhouse-[^|]*) \|", background.__doc__, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}
    prefixes = {"-out": "schoolhouse-engine", "-directory": "schoolhouse"}
    names = {prefixes.get(name, "") + name for name in names}
    assert names == set(re.findall(MADE, made))


@each_error
def test_an_error_is_logged_and_told_and_has_its_traceback_no_more(error, deaths, caplog):
    told = []

    def fail():
        raise error

    assert background.run(fail, "a turn", lambda err: (type(err), err.__traceback__)) == (error, None)
    assert background.run(lambda: 7, "a turn", told.append) == 7
    background.called(lambda one: fail(), "a callback", told.append)(1)
    thread = background.thread(fail, name="schoolhouse-test", on_death=told.append)
    thread.start()
    thread.join(20)
    assert thread.daemon
    assert [type(err) for err in told] == [error, error]
    assert [record.message for record in caplog.records] == [
        "a turn failed",
        "a callback failed",
        "schoolhouse-test failed",
    ]
    for record in caplog.records:
        assert "in fail" in "".join(
            traceback.format_exception(record.exc_info[1], record.exc_info[1], record.exc_info[2])
        )
    deaths.clear()


def test_who_waits_is_told_although_the_log_cannot_be_written(deaths):
    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError("no space left on device")

    told, broken = [], Broken()
    logging.getLogger().addHandler(broken)
    try:
        background.run(lambda: 1 / 0, "a turn", told.append)
    finally:
        logging.getLogger().removeHandler(broken)
    assert [type(error) for error in told] == [ZeroDivisionError]
    deaths.clear()
