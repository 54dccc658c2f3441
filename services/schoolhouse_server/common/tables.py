"""Tables that fit a terminal: columns without room are left out whole, and named, before a word or a number is cut."""

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
    """A column. Those of the highest `rank` are left out first, of two of one rank the one further to the right."""

    title: str
    rank: int = 0  # 0: always there; a name that has no room by itself is cut with an ellipsis
    number: bool = False


@dataclass
class FittingTable:
    """Rows of texts, with as many columns as there is room for."""

    columns: Sequence[Column]
    rows: list[Sequence[str | Text]] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, and below it what it left out."""
        shown = list(range(len(self.columns)))
        last_first = sorted((i for i in shown if self.columns[i].rank), key=lambda i: (self.columns[i].rank, i))
        table, width = self._table(console, shown)
        while width > options.max_width and last_first:
            shown.remove(last_first.pop())
            table, width = self._table(console, shown)
        yield table
        if len(shown) < len(self.columns):
            left_out = [column.title for i, column in enumerate(self.columns) if i not in shown]
            yield Text(f"a wider terminal shows: {', '.join(left_out)}", style="dim")

    def _table(self, console: Console, shown: Sequence[int]) -> tuple[Table, int]:
        """These columns, and how wide they are where nothing is cut."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for column in (self.columns[i] for i in shown):
            justify: JustifyMethod = "right" if column.number else "left"
            table.add_column(column.title, justify=justify, overflow="ellipsis", no_wrap=column.number)
        for row in self.rows:
            cells = (row[i] for i in shown)
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))  # no markup
        return table, Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum
