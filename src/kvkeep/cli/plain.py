"""Text of others on a terminal: a model's path, a client's name, a file's content is shown and never obeyed."""

from __future__ import annotations

from rich.text import Text

from kvkeep.store.namespaces import plain


def cell(*lines: str) -> Text:
    """A table's cell of these lines, in which brackets are brackets and no markup."""
    return Text("\n".join(map(plain, lines)))
