"""What must not leave a server in an error or a log: tokens, paths of its files, and numbers of its tensors."""

import re

_MAX_TEXT = 65_536  # characters that are looked at; the rest is cut off
_MANY = 8  # numbers with decimals in a row

_NAME = r"(?:~\w*|\.{1,2})?/"  # how a path begins: /, ~/, ./ or ../
_RULES = (
    (re.compile(r"\bsht_[\w-]{8,}"), "<token>"),
    (re.compile(r"\b(bearer)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 <token>"),
    (re.compile(r"\bfile:/\S*"), "<path>"),
    (re.compile(rf"(['\"]){_NAME}[^'\"\n]+\1"), r"\1<path>\1"),  # a quoted one may have blanks
    (re.compile(rf"(?<![\w/.~<])(?!(?<=:)//){_NAME}[\w.~@+%-][^\s'\"<>:;,)\]}}|]*"), "<path>"),
    (re.compile(rf"(?<!\d)(?:[-+]?\d+\.\d{{3,}}(?:e[-+]?\d+)?[\s,;\[\]()]+){{{_MANY},}}", re.IGNORECASE), "… "),
)
_TENSOR = re.compile(r"\b(?:Parameter containing:\s*)?(?:tensor|array)\((?=[\[\d.+-]|nan|inf|True|False)")


def scrub(text: str) -> str:
    """The text without them; what is in the place of each says what it was."""
    text = _without_tensors(text[:_MAX_TEXT])
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text


def _without_tensors(text: str) -> str:
    """Without what `repr` of a tensor or an array gives, up to its closing parenthesis."""
    found, at = [], 0
    for match in _TENSOR.finditer(text):
        if match.start() < at:
            continue  # within the one before
        found += [text[at : match.start()], "<tensor>"]
        at = _closing(text, match.end())
    return "".join([*found, text[at:]])


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes what was opened just before `start`; the end if none does."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    return len(text)
