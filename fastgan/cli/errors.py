"""How a command tells a user's mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an ``InputError`` into one line on stderr and exit status 2."""
    from fastgan.metrics.errors import InputError

    try:
        yield
    except InputError as error:
        typer.echo(f"fastgan: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
