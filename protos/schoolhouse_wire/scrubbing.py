"""Remove from errors and logs what must not leave a server: tokens, file paths, and the numbers in tensors."""

import re

_MAX_TEXT = 65_536  # characters; the rest is cut off
_MANY = 8  # decimal numbers in a row that are taken for those of a tensor

_NAME = r"(?:~\w*|\.{1,2})?/"  # how a path begins: /, ~/, ./ or ../
_RULES = (
    (re.compile(r"\bsht_[\w-]{8,}"), "<token>"),
    (re.compile(r"\b(bearer)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 <token>"),
    (re.compile(r"\bfile:/\S*"), "<path>"),
    (re.compile(rf"(['\"]){_NAME}[^'\"\n]+\1"), r"\1<path>\1"),  # a quoted path may contain blanks
    (re.compile(rf"(?<![\w/.~<])(?!(?<=:)//){_NAME}[\w.~@+%-][^\s'\"<>:;,)\]}}|]*"), "<path>"),
    (re.compile(rf"(?<!\d)(?:[-+]?\d+\.\d{{3,}}(?:e[-+]?\d+)?[\s,;\[\]()]+){{{_MANY},}}", re.IGNORECASE), "… "),
)
_TENSOR = re.compile(r"\b(?:Parameter containing:\s*)?(?:tensor|array)\((?=[\[\d.+-]|nan|inf|True|False)")


def scrub(text: str) -> str:
    """The text with each of them replaced by a word that says what it was."""
    text = _without_tensors(text[:_MAX_TEXT])
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text


def _without_tensors(text: str) -> str:
    """The text with the `repr` of each tensor or array, up to its closing parenthesis, replaced."""
    found, at = [], 0
    for match in _TENSOR.finditer(text):
        if match.start() < at:
            continue  # inside the previous match
        found += [text[at : match.start()], "<tensor>"]
        at = _closing(text, match.end())
    return "".join([*found, text[at:]])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one just before `start`; the end of the text if none does."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    return len(text)
