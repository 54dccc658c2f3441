"""Names of modules as a tree, like `print(module)`, with runs of equal layers shown once."""

from collections.abc import Iterator, Sequence


class _Node:
    def __init__(self, kind: str = "") -> None:
        self.kind = kind
        self.children: dict[str, _Node] = {}

    def lines(self) -> list[str]:
        """The node's class, and below it its children."""
        if not self.children:
            return [self.kind]
        shown = [f"  {line}" for run in self._runs() for line in run]
        return [f"{self.kind}(", *shown, ")"]

    def _runs(self) -> Iterator[list[str]]:
        """The lines of each child, or once for several equal children whose names are consecutive numbers."""
        first = last = ""
        alike: list[str] = []
        for name, child in self.children.items():
            lines = child.lines()
            if alike == lines and last.isdecimal() and name == str(int(last) + 1):
                last = name
                continue
            if first:
                yield _named(first, last, alike)
            first, last, alike = name, name, lines
        yield _named(first, last, alike)


def _named(first: str, last: str, lines: Sequence[str]) -> list[str]:
    if first == last:
        return [f"({first}){': ' if lines[0] else ''}{lines[0]}", *lines[1:]]
    count = int(last) - int(first) + 1
    return [f"({first}-{last}): {count} x {lines[0]}".rstrip(), *lines[1:]]


def module_tree(class_name: str, modules: Sequence[str], classes: Sequence[str] = ()) -> str:
    """The tree of a model, from its class name, the dotted names of its modules and, if known, their classes."""
    root = _Node(class_name)
    kinds = classes if len(classes) == len(modules) else [""] * len(modules)
    for name, kind in zip(modules, kinds, strict=True):
        node = root
        for step in name.split(".") if name else ():
            node = node.children.setdefault(step, _Node())
        node.kind = kind or node.kind
    return "\n".join(root.lines())
