"""Runs programs as `python` does, each in a process that is forked from one which has imported what they need.

Importing torch takes seconds. As a script this is the process that forks: it reads what to run from stdin, and
answers each line with a process id or an exit status.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

IMPORTED = [
    "torch._dynamo",  # which the first step of an optimizer imports, for longer than torch takes
    "schoolhouse.remote.teacher",
    "schoolhouse_server.cli.main",
    "schoolhouse_server.replica.replica",
    "sklearn.datasets",
]


class Program:
    """A program that was started; what it writes goes to files."""

    def __init__(self, runner, arguments, folder, pid):
        self._runner, self._arguments, self._folder, self.pid = runner, arguments, folder, pid
        self._status = None

    def poll(self):
        """Its exit status; None while it runs."""
        if self._status is None:
            self._status = self._runner.ask(poll=self.pid)
        return self._status

    def wait(self):
        """The program as `subprocess.run` returns it, once it has ended."""
        if self._status is None:
            self._status = self._runner.ask(wait=self.pid)
        texts = [(self._folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self._arguments, self._status, *texts)

    def kill(self):
        """End it if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Runner:
    """The process that forks, from its first program on."""

    @functools.cached_property
    def _server(self):
        server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._end, server)
        return server

    @functools.cached_property
    def _folder(self):
        return tempfile.TemporaryDirectory(prefix="programs-")

    def _end(self, server):
        server.stdin.close()
        server.wait(timeout=30)

    def ask(self, **what):
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments, cwd=None, env=None, timeout_s=150):
        """Start a program with the arguments that `python` gets; after `timeout_s` it says where it is, and ends."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        given = [str(one) for one in arguments]
        start = {"arguments": given, "cwd": str(cwd or os.getcwd()), "env": dict(env or os.environ)}
        pid = self.ask(start=start | {"folder": str(folder), "timeout_s": timeout_s})
        return Program(self, given, folder, pid)


_RUNNER = Runner()
start = _RUNNER.start


def run(*arguments, **options):
    """Run a program to its end; see `Runner.start`."""
    return start(*arguments, **options).wait()


def command(*arguments, **options):
    """Run the command `schoolhouse`."""
    return run("-c", "from schoolhouse_server.cli.main import main; main()", *arguments, **options)


def _forked(folder, cwd, env, **program):
    """The process id of a child that is to run the program; in the child, the program."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate((os.devnull, f"{folder}/stdout", f"{folder}/stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    return program


def _run_to_its_end(program):
    """Run a program, and end as Python does, but for taking its modules apart, which takes seconds in a fork."""
    status = 1
    try:
        _run(**program)
        status = 0
    except SystemExit as err:
        status = err.code if isinstance(err.code, int) else int(err.code is not None)
        if isinstance(err.code, str):
            print(err.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(arguments, timeout_s):
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    kind, *rest = arguments
    paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    first = "" if kind in ("-c", "-m") else str(Path(kind).parent.resolve())
    sys.path[:] = [first, *(path for path in paths if path not in sys.path), *sys.path[1:]]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(rest[0], "<string>", "exec"), main)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def _main():
    """Serve until stdin ends."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # so that no child copies all of this when it collects garbage
    ended = {}
    for line in sys.stdin:
        [(what, given)] = json.loads(line).items()
        if what == "start":
            answer = _forked(**given)
            if isinstance(answer, dict):
                _run_to_its_end(answer)
        else:
            if given not in ended:
                pid, status = os.waitpid(given, os.WNOHANG if what == "poll" else 0)
                ended.update({given: os.waitstatus_to_exitcode(status)} if pid else {})
            answer = ended.get(given)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
