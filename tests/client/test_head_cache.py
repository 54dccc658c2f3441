"""Heads on disk: whole or not there, never believed, bounded in bytes, and fetched once."""

import gc
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schoolhouse import errors
from schoolhouse.lm_head.disk_cache import HeadCache, default_cache_folder
from schoolhouse.lm_head.head import Head
from schoolhouse.lm_head.operations import layer_norm, linear, rms_norm, scale, softcap

HELPERS = Path(__file__).parents[1] / "helpers"


def made(seed=0, classes=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((3,), (classes, 3), (classes,))]
    return Head([rms_norm(numbers[0], 1e-6, offset=1, cast="after"), linear(*numbers[1:]), scale(0.1), softcap(3)])


HEAD = made()
KEY = ("0123456789abcdef", "lm_head", "")


@pytest.fixture
def cache(tmp_path):
    return HeadCache(tmp_path / "heads")


def only_file(cache):
    (path,) = cache.folder.iterdir()
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_head_comes_back_as_it_was(cache, dtype):
    assert cache.get(*KEY) is None
    head = made(dtype=dtype)
    cache.put(*KEY, head)
    back = cache.get(*KEY)
    assert (back.digest, repr(back), back.nbytes) == (head.digest, repr(head), head.nbytes)
    hidden = torch.randn(4, 3)
    assert torch.equal(back.logits(hidden), head.logits(hidden))


def test_the_file_is_one_that_safetensors_reads(cache):
    head = Head([layer_norm(None, None, 1e-5), linear(torch.arange(6.0).view(2, 3).t())])
    cache.put(*KEY, head)
    assert safetensors.torch.load_file(only_file(cache)) == {
        "1.weight": pytest.approx(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    }
    assert cache.get(*KEY).digest == head.digest


def test_each_key_has_a_head_of_its_own(cache):
    keys = [KEY, ("other", *KEY[1:]), (KEY[0], "head", ""), (KEY[0], "lm_head", "lm_head"), (KEY[0], "lm_hea", "d")]
    for i, key in enumerate(keys):
        cache.put(*key, made(i))
    assert [cache.get(*key).digest for key in keys] == [made(i).digest for i in range(len(keys))]


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.text(min_size=1), st.text(), st.text()))
def test_no_name_leads_out_of_the_folder(tmp_path_factory, key):
    folder = tmp_path_factory.mktemp("outer")
    cache = HeadCache(folder / "heads")
    cache.put(*key, made())
    assert [path.name for path in folder.iterdir()] == ["heads"]
    assert only_file(cache).is_file()
    assert cache.get(*key).digest == made().digest


@pytest.mark.parametrize(
    "key", [("../../x", "/etc/passwd", "a/../b"), ("\0", "\ud800", "x" * 5000), ("*", "~", "$HOME")]
)
def test_hostile_names(cache, key):
    cache.put(*key, made())
    assert only_file(cache).parent == cache.folder
    assert cache.get(*key).digest == made().digest


def test_no_revision():
    with pytest.raises(ValueError, match="describe"):
        HeadCache(Path("nowhere")).fetch("", "lm_head", "", made)


# What is never believed.


def test_damaged_files_are_removed(cache):
    cache.put(*KEY, made())
    path = only_file(cache)
    whole = path.read_bytes()
    for size in (0, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert cache.get(*KEY) is None
        assert not path.exists()
    for content in (b"\0" * len(whole), whole + b"\0", os.urandom(len(whole))):
        path.write_bytes(content)
        assert cache.get(*KEY) is None
        assert not path.exists()


def test_each_bit_of_the_weights_counts(cache):
    cache.put(*KEY, made())
    path = only_file(cache)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(start, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.get(*KEY) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_changed_bytes_never_make_another_head(tmp_path_factory, data):
    cache = HeadCache(tmp_path_factory.mktemp("heads"))
    cache.put(*KEY, made())
    path = only_file(cache)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    back = cache.get(*KEY)
    assert back is None or back.digest == made().digest


def test_a_file_of_another_head_is_removed(cache):
    cache.put("other", *KEY[1:], made())
    other = only_file(cache)
    cache.put(*KEY, made(1))
    (path,) = set(cache.folder.iterdir()) - {other}
    path.write_bytes(other.read_bytes())
    assert cache.get(*KEY) is None
    assert not path.exists()
    assert cache.get("other", *KEY[1:]).digest == made().digest


@pytest.mark.parametrize("change", [{"format": "schoolhouse.head.v0"}, {"head": "[]"}, {"head": "{"}, {"head": "{}"}])
def test_another_description_is_removed(cache, change):
    cache.put(*KEY, made())
    path = only_file(cache)
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {**facts, **change})
    assert cache.get(*KEY) is None
    assert not path.exists()


def test_settings_are_in_the_digest(cache):
    cache.put(*KEY, made())
    path = only_file(cache)
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
    value = json.loads(facts["head"])
    assert value["operations"][2] == {"kind": "scale", "weights": [], "settings": {"factor": 0.1}}
    value["operations"][2]["settings"]["factor"] = 0.2
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {**facts, "head": json.dumps(value)})
    assert cache.get(*KEY) is None


# Bounded.


def test_the_least_recently_used_are_removed(cache):
    cache.put("a", *KEY[1:], made())
    first = only_file(cache)
    nbytes = first.stat().st_size
    os.utime(first, (0, 0))
    cache = HeadCache(cache.folder, max_bytes=3 * nbytes + nbytes // 2)
    mine = cache.folder / "notes.txt"
    mine.write_bytes(bytes(10 * nbytes))
    for i, revision in enumerate("bc"):
        before = {*cache.folder.iterdir()}
        cache.put(revision, *KEY[1:], made())
        [path] = {*cache.folder.iterdir()} - before
        os.utime(path, (i + 1, i + 1))  # the clock of files stands still for some ms
    assert cache.get("a", *KEY[1:]) is not None
    cache.put("d", *KEY[1:], made())
    assert [cache.get(revision, *KEY[1:]) is not None for revision in "abcd"] == [True, False, True, True]
    assert mine.exists()


def test_what_killed_writers_left_is_removed(cache):
    cache.put(*KEY, made())
    left = cache.folder / f".{'0' * 64}.safetensors.0123.part"
    left.touch()
    cache.put(*KEY, made())
    assert not left.exists()


def test_a_head_beyond_the_bound_is_not_kept(cache):
    HeadCache(cache.folder, max_bytes=made().nbytes - 1).put(*KEY, made())
    assert cache.get(*KEY) is None
    with pytest.raises(ValueError, match="max_bytes is -1"):
        HeadCache(cache.folder, max_bytes=-1)


# A folder that cannot be written to.


def hidden_by_a_file(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file" / "heads"


def read_only(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "heads"
    folder.mkdir(mode=0o500)
    return folder


@pytest.mark.parametrize("make", [hidden_by_a_file, read_only])
def test_a_folder_that_cannot_be_written_to_costs_one_warning(tmp_path, make):
    folder = make(tmp_path)
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert HeadCache(folder).fetch("a", *KEY[1:], made).digest == made().digest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HeadCache(folder).fetch("b", *KEY[1:], made).digest == made().digest


def test_the_default_folder(monkeypatch):
    assert default_cache_folder() == Path.home() / ".cache/schoolhouse/heads"
    monkeypatch.setattr(Path, "home", lambda: Path("~missing").expanduser())  # raises, as for a user without a home
    assert default_cache_folder() is None


def test_without_a_folder_a_process_still_shares_its_heads():
    cache = HeadCache(None)
    head = cache.fetch(*KEY, made)
    assert HeadCache(None).fetch(*KEY, lambda: pytest.fail("it is in memory")) is head
    assert cache.get(*KEY) is None


# Fetched once.


def test_callers_share_one_head(cache):
    calls = []

    def load():
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return made()

    with ThreadPoolExecutor(8) as pool:
        heads = list(pool.map(lambda _: HeadCache(cache.folder).fetch(*KEY, load), range(8)))
    assert len(calls) == 1
    assert len({id(head) for head in heads}) == 1
    del heads
    gc.collect()
    assert cache.fetch(*KEY, lambda: pytest.fail("it is on disk")).digest == made().digest


def test_after_a_failure_the_next_caller_loads(cache):
    started, waiting = threading.Event(), threading.Event()

    def fail():
        started.set()
        waiting.wait(10)
        raise ConnectionError("gone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.fetch, *KEY, fail)
        started.wait(10)
        second = pool.submit(cache.fetch, *KEY, made)
        waiting.set()
        with pytest.raises(ConnectionError):
            first.result(10)
        assert second.result(10).digest == made().digest


def test_a_damaged_file_is_fetched_again(cache):
    cache.put(*KEY, made())
    only_file(cache).write_bytes(b"x" * 100)
    assert cache.fetch(*KEY, lambda: made(1)).digest == made(1).digest
    assert cache.get(*KEY).digest == made(1).digest


def test_a_head_of_another_digest_is_fetched_again(cache):
    old = cache.fetch(*KEY, made)
    new = cache.fetch(*KEY, lambda: made(1), digest=made(1).digest)
    assert new.digest == cache.get(*KEY).digest == made(1).digest
    assert cache.fetch(*KEY, lambda: pytest.fail("it is in memory"), digest=new.digest) is new
    with pytest.raises(errors.CorruptPayloadError, match="another digest"):
        cache.fetch(*KEY, lambda: old, digest="0" * 32)
    assert cache.get(*KEY).digest == new.digest


# Several processes.

_WRITER = """
import sys
from pathlib import Path
from test_head_cache import KEY, HeadCache, made
cache = HeadCache(Path(sys.argv[1]), max_bytes=1 << 22)
while True:
    cache.put(*KEY, made(classes=100_000))
    print(flush=True)
"""


def writer(folder):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HELPERS)])}
    return subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE, env=env)


def test_whoever_reads_finds_a_whole_head_even_if_writers_are_killed(cache):
    expected = made(classes=100_000).digest
    writers = [writer(cache.folder) for _ in range(2)]
    try:
        for process in writers:
            process.stdout.readline()
        for _ in range(10):
            assert cache.get(*KEY).digest == expected
    finally:
        for process in writers:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
    assert cache.get(*KEY).digest == expected
    cache.put(*KEY, made(1))
    only_file(cache)  # nothing of what the killed ones were writing
    assert cache.get(*KEY).digest == made(1).digest
