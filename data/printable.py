"""
Text of models and files as people may be shown it, on a terminal or in a file that they read.

What is left out: text that only programs read; in log.jsonl JSON escapes all that is not ASCII.
Tests: tests/test_printable.py
"""
from __future__ import annotations

import contextlib
import io
import os
import unicodedata

# Control characters, which a terminal obeys: they clear its screen, set its title, answer for the
# keyboard; characters of format, which reverse or hide their neighbours; halves of surrogate
# pairs, which no file can hold; separators of lines
ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"           # of category Cf, and a part of ordinary text and of emoji


def printable(text: str, keep: str = "\n\t") -> str:
    """The same text, with the characters that a terminal does not simply show replaced by their
    escapes, which are those of Python and of bash: \\x1b, \\u202e. Those in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(shown(x, keep) for x in text)


def one_line(text: str) -> str:
    """printable, in one line: a line break becomes \\n."""
    return printable(text, keep="")


def shown(x: str, keep: str) -> str:
    """One character."""
    if x in keep or x in JOINERS or unicodedata.category(x) not in ESCAPED:
        return x
    if x in "\n\t\r":
        return repr(x)[1:-1]
    number = ord(x)
    if number < 0x80:
        return f"\\x{number:02x}"
    if number < 0x10000:
        return f"\\u{number:04x}"
    return f"\\U{number:08x}"


class PrintableFile(io.TextIOWrapper):
    """A text file in which everything is `printable`, in lines: for what other libraries print.
    What a full disk does not take is lost."""

    def __init__(self, fd: int):
        super().__init__(os.fdopen(fd, "wb", buffering=0, closefd=False), encoding="utf-8",
                         write_through=True)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(printable(text.replace("\r", "\n")))   # of progress bars
        return len(text)
