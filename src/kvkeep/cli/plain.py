"""Text of others on a terminal: a model's path, a client's name, a file's content is shown and never obeyed."""

from __future__ import annotations

from rich.text import Text


def plain(text: str) -> str:
    """The text on one line, with what a terminal would obey (ESC, a new line, a change of direction) written out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def cell(*lines: str) -> Text:
    """A table's cell of these lines, in which brackets are brackets and no markup."""
    return Text("\n".join(map(plain, lines)))
