"""One-line errors for mistakes of the user."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

# Depending on its version, Typer has its own copy of click or imports click.
UsageError: Any = typer.BadParameter.__base__

# Errors of the disk, not of the program.
_PLACES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
)


class OneLineErrors(TyperGroup):
    """Commands whose usage errors are one line on stderr and exit status 2, without the usage."""

    program = "fastgan"

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Parse the options of the group."""
        with _usage_errors(self.program):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse the options of a command, and run it."""
        with _usage_errors(self.program):
            return super().invoke(ctx)


@contextmanager
def _usage_errors(program: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if type(error).show is not UsageError.show:  # the help, shown without arguments
            raise
        _fail(program, error.format_message())


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an ``InputError``, or a file that cannot be read or written, into one line on stderr and exit status 2."""
    from fastgan._checks import InputError

    try:
        yield
    except InputError as error:
        _fail("fastgan", str(error))
    except OSError as error:
        if error.errno not in _PLACES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail("fastgan", f"{where}{error.strerror}")


def printable(text: str) -> str:
    r"""Return ``text`` with the non-UTF-8 bytes of file names escaped as ``\\xe9``, which any terminal can print."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _fail(program: str, message: str) -> None:
    """Print one line, however many processes torchrun started, and exit with status 2 in all of them."""
    line = printable(f"{program}: error: {' '.join(message.split())}")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        typer.echo(line, err=True)
    else:
        from fastgan.distributed import told_by_one

        told_by_one(line, functools.partial(typer.echo, err=True))
    raise typer.Exit(2) from None
