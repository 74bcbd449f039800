"""Shows the text of others (a model's path, a client's name, a file's content) on a terminal, as text alone."""

from __future__ import annotations

from rich.text import Text

from kvkeep.store.namespaces import plain


def cell(*lines: str) -> Text:
    """A table's cell of these lines. Brackets in them are no markup, control characters are shown as escapes."""
    return Text("\n".join(map(plain, lines)))
