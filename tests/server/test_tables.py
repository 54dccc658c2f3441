"""Tables of the command line at several widths: columns are left out, and no word is broken and no number cut."""

import io

import pytest
from loads import Running
from rich.console import Console
from rich.text import Text
from schoolhouse_server.common.tables import Column, FittingTable
from schoolhouse_server.observe.watched import Watched
from schoolhouse_server.pool import status_rows

WIDTHS = (60, 80, 120, 200)
STATUS = {
    "teacher": "language-model",
    "id": "3f9c01ab",
    "stage": "waiting for resources",
    "revision": "9f8e7d6c5b4a39281706",
    "address": "10.213.177.101:7199",
    "sessions": 128,
    "queued": 1000,
    "in_flight": 64,
    "served": 123456789,
    "joined": 98765432,
    "cached": 1,
    "missed": 3,
}
JOB = {
    "teacher": "language-model",
    "job": "experiment-42-seed-1",
    "weight": 0.1 + 0.2,
    "sessions": 128,
    "in_flight": 8192,
    "requests": 123456789,
    "rows": 9876543210,
    "waits": 54321,
    "errors": 12345,
    "revision": "9f8e7d6c5b4a39281706",
}


def printed(renderable, width):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def top(part):
    watched, running = Watched("head:7070"), Running()
    watched.heard(running(), 10.0)
    watched.heard(running(), 12.0)
    return getattr(watched, part)(12.0)


TABLES = {
    "status": lambda: status_rows.replica_table([STATUS, {**STATUS, "id": "00000000", "stage": "serving"}]),
    "jobs": lambda: status_rows.job_table([JOB]),
    "top replicas": lambda: top("replicas"),
    "top jobs": lambda: top("jobs"),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_what_is_shown_is_whole(name, width):
    table = TABLES[name]()
    text = printed(table, width)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    head, _, *rows = lines
    rows = rows[: len(table.rows)]
    titles = [column.title for column in table.columns]
    left_out = " ".join(text.partition("a wider terminal shows: ")[2].split())
    missing = left_out.split(", ") if left_out else []
    kept = [i for i, title in enumerate(titles) if title not in missing]
    assert head.split() == " ".join(titles[i] for i in kept).split()
    for line, row in zip(rows, table.rows, strict=True):
        assert line.split() == " ".join(str(row[i]) for i in kept).split()  # every word and every number, in order
    assert "…" not in text


@pytest.mark.parametrize("name", TABLES)
def test_a_wide_terminal_leaves_nothing_out(name):
    assert "a wider terminal" not in printed(TABLES[name](), 200)
    counts = [printed(TABLES[name](), width).splitlines()[0].split() for width in WIDTHS]
    assert [len(found) for found in counts] == sorted(len(found) for found in counts)
    assert len(counts[0]) < len(counts[-1])


def test_what_matters_least_goes_first():
    columns = (Column("a"), Column("bb", rank=1, number=True), Column("cc", rank=2), Column("dd", rank=2))
    table = FittingTable(columns, [["x" * 4, "1", "y" * 4, Text("z" * 4)]])
    shown_at = [printed(table, width).splitlines()[0].split() for width in (40, 15, 10, 4)]
    assert shown_at == [["a", "bb", "cc", "dd"], ["a", "bb", "cc"], ["a", "bb"], ["a"]]


def test_a_name_without_room_is_cut_where_it_shows():
    table = FittingTable((Column("teacher"), Column("n", number=True)), [["x" * 80, "1234"]])
    line = printed(table, 40).splitlines()[2]
    assert line.split()[0].endswith("…")
    assert line.split()[-1] == "1234"


def test_names_are_no_markup():
    assert "[red]x" in printed(FittingTable((Column("job"),), [["[red]x"]]), 80)
