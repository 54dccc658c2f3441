"""Messages through pipes: whole, in order, bounded, and never a hang."""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
import schoolhouse as sh
import torch
from deaf import deafness
from ends import Ends, loop
from memfd import soon
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.same_host import pipes
from schoolhouse_wire.v1 import teacher_pb2
from stub import Stub
from torch import nn

HELPERS = str(Path(__file__).parents[1] / "helpers")
SIZES = [0, 1, 3, 4, 100, 65_531, 65_532, 65_533, 65_536, 200_000, 3 << 20, 5, 0, 7]


class Filled(nn.Module):
    def __init__(self):
        super().__init__()
        self.may = threading.Event()
        self.may.set()

    def forward(self, size, value):
        assert self.may.wait(20)
        return torch.full((int(size),), int(value), dtype=torch.uint8)


def offer_of(made):
    offer = teacher_pb2.SharedMemory(pid=os.getpid())
    made.describe_in(offer)
    return offer


def offered():
    """Both sides of a pair of pipes, as replica and client have them."""
    made = pipes.Offered(loop())
    client = Ends.of(offer_of(made))
    made.withdraw()
    return Ends(made.pipes), client


def fds():
    return len(os.listdir("/proc/self/fd"))


def pipe_ends():
    """How many descriptors each pipe has here."""
    found = collections.Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return collections.Counter({name: count for name, count in found.items() if name.startswith("pipe:")})


def in_thread(target):
    results = []
    thread = threading.Thread(target=lambda: results.append(target()), daemon=True)
    thread.start()
    return thread, results


@pytest.mark.parametrize("way", ["to_client", "to_replica"])
def test_messages_arrive_whole_and_in_order_both_ways_at_once(way):
    replica, client = offered()
    sender, receiver = (replica, client) if way == "to_client" else (client, replica)
    messages = [os.urandom(size) for size in SIZES * 3]
    others = [os.urandom(size) for size in reversed(SIZES)]
    threads = [
        in_thread(lambda: all(sender.send(one) for one in messages)),
        in_thread(lambda: all(receiver.send(one) for one in others)),
        in_thread(lambda: [next(arrivals) for _ in others] if (arrivals := iter(sender)) else None),
    ]
    arrivals = iter(receiver)
    assert [next(arrivals) for _ in messages] == messages
    for thread, _ in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [found for _, [found] in threads] == [True, True, others]


def test_a_sender_waits_for_the_reader_and_close_ends_both():
    replica, client = offered()
    sender, sent = in_thread(lambda: replica.send(bytes(1 << 20)))
    reader, read = in_thread(lambda: list(replica))
    time.sleep(0.2)
    assert sender.is_alive()
    assert reader.is_alive()
    replica.close()
    sender.join(20)
    reader.join(20)
    assert (sent, read) == ([False], [[]])
    assert not replica.send(b"late")
    assert list(replica) == []
    del client


def test_when_the_other_side_is_gone_what_it_sent_is_read_and_then_it_ends():
    replica, client = offered()
    assert client.send(b"one")
    assert client.send(b"two")
    client.close()
    assert list(replica) == [b"one", b"two"]
    assert not replica.send(b"three")


def test_a_message_cut_short_by_the_end_is_not_a_message():
    replica, client = offered()
    os.write(client.pipes._outgoing, (5).to_bytes(4, "little") + b"abc")
    client.close()
    assert list(replica) == []


def test_a_length_over_the_limit_is_refused_before_memory_is_taken():
    replica, client = offered()
    os.write(client.pipes._outgoing, (channel.MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(
        errors.ProtocolError, match=f"{channel.MAX_MESSAGE_BYTES + 1} bytes.*limit of {channel.MAX_MESSAGE_BYTES}"
    ):
        next(iter(replica))


def test_every_descriptor_is_closed():
    before = fds()
    for _ in range(20):
        replica, client = offered()
        del replica, client
    made = pipes.Offered(loop())  # never opened, never withdrawn
    del made
    assert soon(lambda: fds() <= before), (before, fds())  # those of earlier tests may be closed meanwhile


def test_what_is_not_the_offered_pipe_is_not_opened(tmp_path):
    made, others = pipes.Offered(loop()), pipes.Offered(loop())
    before = pipe_ends()
    with open(tmp_path / "file", "w") as file:
        changes = [
            {"to_client_fd": file.fileno()},
            {"to_replica_fd": file.fileno()},
            {"to_replica_fd": 10_000},
            {"to_client_fd": others.to_client_fd},  # a pipe, but of another session
            {"to_replica_fd": others.to_replica_fd},
            {"to_client_inode": 0, "to_replica_inode": 0},  # of a replica that knows nothing of pipes
        ]
        for change in changes:
            offer = offer_of(made)
            offer.MergeFrom(teacher_pb2.SharedMemory(**change))
            for name, value in change.items():
                setattr(offer, name, value)
            with pytest.raises(OSError, match=r"not the replica|No such file"):
                pipes.open_offered(loop(), offer)
    assert not pipe_ends() - before


@pytest.mark.parametrize("refused", ["first pipe2", "second pipe2"])
def test_without_descriptors_left_none_is_lost(refused, monkeypatch):
    before = pipe_ends()
    pipe2, calls = os.pipe2, []

    def counted(flags):
        calls.append(flags)
        if len(calls) == ["first pipe2", "second pipe2"].index(refused) + 1:
            raise OSError(24, "Too many open files")
        return pipe2(flags)

    monkeypatch.setattr(os, "pipe2", counted)
    with pytest.raises(OSError, match="Too many"):
        pipes.Offered(loop())
    assert not pipe_ends() - before


def test_after_the_end_what_has_arrived_is_read_but_no_more_than_a_pipe_holds():
    replica, client = offered()
    for i in range(100):
        assert replica.send(bytes([i]))
    client.end()
    assert list(client) == [bytes([i]) for i in range(100)]
    assert not client.send(b"late")
    assert list(client) == []

    replica, client = offered()
    client.end()
    sender, _ = in_thread(lambda: [replica.send(bytes(30_000)) for _ in range(1000)])
    assert len(list(client)) < 100  # though the other side goes on and on
    replica.close()
    sender.join(20)
    assert not sender.is_alive()


def test_after_kill_9_of_the_other_side_both_directions_end():
    made = pipes.Offered(loop())
    code = (
        "import sys, time; from ends import Ends; from schoolhouse_wire.v1 import teacher_pb2 as pb; "
        "p = Ends.of(pb.SharedMemory(pid=int(sys.argv[1]), to_replica_fd=int(sys.argv[2]), "
        "to_client_fd=int(sys.argv[3]), to_replica_inode=int(sys.argv[4]), to_client_inode=int(sys.argv[5]))); "
        "p.send(b'here'); time.sleep(60)"
    )
    offer = offer_of(made)
    ends = [offer.pid, offer.to_replica_fd, offer.to_client_fd, offer.to_replica_inode, offer.to_client_inode]
    path = os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])
    command, own = [sys.executable, "-c", code, *map(str, ends)], Ends(made.pipes)
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as child:
        arrivals = iter(own)
        assert next(arrivals) == b"here"
        made.withdraw()
        sender, sent = in_thread(lambda: own.send(bytes(1 << 20)))
        child.send_signal(signal.SIGKILL)
        assert list(arrivals) == []
        sender.join(20)
        assert sent == [False]


def test_a_session_uses_them_and_replies_without_room_in_the_segment_go_through_them_too(monkeypatch):
    through = []
    post = pipes.Pipes.post

    def posted(self, message, then):
        through.append(len(message))
        post(self, message, then)

    monkeypatch.setattr(pipes.Pipes, "post", posted)
    with serve(Filled(), shared_memory_bytes=1 << 20) as server, sh.connect(server.url) as teacher:
        sizes = [10, 100_000, 5 << 20, 100_000, 7 << 20, 10]
        asked = [teacher.submit((torch.tensor(size), torch.tensor(i)), {}, [""]) for i, size in enumerate(sizes)]
        for i, (size, future) in enumerate(zip(sizes, asked, strict=True)):
            assert future.result(20)[""].tolist() == [i] * size if size < 1000 else future.result(20)[""].eq(i).all()
        assert "2 replies that found no room" in teacher.describe().transport
    assert sum(through) > 12 << 20  # the two large replies, in frames
    assert len(through) > 2 * len(sizes)


def test_without_pipes_the_stream_carries_the_messages(monkeypatch):
    monkeypatch.setattr(pipes, "open_offered", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with serve(Filled()) as server, sh.connect(server.url) as teacher:
        asked = [teacher.submit((torch.tensor(100_000), torch.tensor(i)), {}, [""]) for i in range(8)]
        for i, future in enumerate(asked):
            assert future.result(20)[""].eq(i).all()
        assert teacher.describe().transport == "shared memory"


def test_a_replica_without_descriptors_left_offers_no_shared_memory(monkeypatch, no_segments):
    monkeypatch.setattr(os, "pipe2", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    with serve(Filled()) as server, sh.connect(server.url) as teacher:
        assert teacher.describe().transport == "stream: the replica offers no shared memory"
        assert teacher.submit((torch.tensor(5), torch.tensor(1)), {}, [""]).result(20)[""].tolist() == [1] * 5


def test_rubbish_in_a_pipe_ends_the_session_with_a_typed_status_and_no_other():
    with serve(Filled()) as server, sh.connect(server.url) as teacher:
        stub = Stub(server)
        ours = Ends.of(stub.offer)
        stub.attach(pipes=True)
        ours.send(b"\xff" * 50)
        with pytest.raises(grpc.RpcError, match="cannot be parsed"):
            list(stub.answers)
        assert list(ours) == []
        assert teacher.submit((torch.tensor(5), torch.tensor(1)), {}, [""]).result(20)[""].tolist() == [1] * 5


def test_a_client_that_hangs_up_frees_its_session_and_the_other_way_round():
    with serve(Filled()) as server:
        before = fds()
        teacher = sh.connect(server.url)
        future = teacher.submit((torch.tensor(5), torch.tensor(1)), {}, [""])
        assert future.result(20)[""].tolist() == [1] * 5
        teacher.close()
        assert soon(lambda: server._servicer.sessions == 0)
        assert soon(lambda: fds() <= before), (before, fds())
        teacher = sh.connect(server.url, timeouts=sh.Timeouts(teacher_s=0.5))
        teacher.describe()  # has a session open
        teacher.submit((torch.tensor(5), torch.tensor(1)), {}, [""]).result(20)
    with pytest.raises(errors.SchoolhouseError):
        teacher.submit((torch.tensor(5), torch.tensor(1)), {}, [""]).result(20)


def test_a_second_open_ends_the_session_and_a_client_that_keeps_its_descriptors_keeps_no_session():
    with serve(Filled()) as server:
        kept = []
        for _ in range(3):
            stub = Stub(server)
            kept.append(Ends.of(stub.offer))
            stub.attach(pipes=True)
            for i in range(1000):  # failures that nobody reads
                call = teacher_pb2.Call(request_id=i, revision="no")
                if not kept[-1].send(teacher_pb2.ClientMessage(call=call).SerializeToString()):
                    break
            again = teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher", shared_memory=True)
            kept[-1].send(teacher_pb2.ClientMessage(open=again).SerializeToString())
            attached = teacher_pb2.Attached(attached=True, pipes=True)
            kept[-1].send(teacher_pb2.ClientMessage(attached=attached).SerializeToString())
            with pytest.raises(grpc.RpcError, match="Open came twice"):
                list(stub.answers)
        stub = Stub(server)  # and one that just goes
        kept.append(Ends.of(stub.offer))
        stub.attach(pipes=True)
        assert soon(lambda: server._servicer.sessions == 1)
        stub.answers.cancel()
        assert soon(lambda: server._servicer.sessions == 0)


@pytest.fixture
def deaf():
    with deafness() as found:
        yield found


def test_replies_written_before_the_server_ended_are_delivered(deaf):
    module = Filled()
    server = serve(module)
    teacher = sh.connect(server.url)
    teacher.submit((torch.tensor(5), torch.tensor(1)), {}, [""]).result(20)
    [session] = teacher.open_sessions()
    deaf.begin(teacher)
    asked = [teacher.submit((torch.tensor(5), torch.tensor(i)), {}, [""]) for i in range(20)]
    assert soon(lambda: server.load("teacher").served == 21)
    [member] = server._context.drain._sessions
    assert soon(lambda: not member.outstanding)  # they are in the pipe
    server.close()
    assert soon(lambda: session._same_host.pipes._ended)
    deaf.go_on.set()
    assert [future.result(20)[""][0].item() for future in asked] == list(range(20))
    teacher.close()
