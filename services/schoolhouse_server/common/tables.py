"""Tables that fit a terminal: if there is no room, whole columns are left out and named, rather than cells cut."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 10_000


@dataclass(frozen=True)
class Column:
    """A column.

    Columns of the highest `rank` are left out first; of the same rank, those further to the right.
    """

    title: str
    rank: int = 0  # 0: never left out; if it has no room, its text is cut with an ellipsis
    number: bool = False
    help: str = ""


@dataclass
class FittingTable:
    """A table of texts that shows as many of its columns as there is room for."""

    columns: Sequence[Column]
    rows: list[Sequence[str | Text]] = field(default_factory=list)
    note: str = ""  # a line below it

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, and below it the titles of the columns left out."""
        shown = list(range(len(self.columns)))
        last_first = sorted((i for i in shown if self.columns[i].rank), key=lambda i: (self.columns[i].rank, i))
        table, width = self._table(console, shown)
        while width > options.max_width and last_first:
            shown.remove(last_first.pop())
            table, width = self._table(console, shown)
        yield table
        if self.note:
            yield Text(self.note, style="dim")
        if len(shown) < len(self.columns):
            left_out = [column.title for i, column in enumerate(self.columns) if i not in shown]
            yield Text(f"a wider terminal shows: {', '.join(left_out)}", style="dim")

    def _table(self, console: Console, shown: Sequence[int]) -> tuple[Table, int]:
        """The table of these columns, and its width if nothing is cut."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for column in (self.columns[i] for i in shown):
            justify: JustifyMethod = "right" if column.number else "left"
            table.add_column(column.title, justify=justify, overflow="ellipsis", no_wrap=column.number)
        for row in self.rows:
            cells = (row[i] for i in shown)
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))  # no markup
        return table, Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum
