"""The one exception that the command line turns into a single line."""

from __future__ import annotations


class InputError(ValueError):
    """The data, files or options given cannot be used; the message says which and what is allowed.

    A ``ValueError`` like every other argument error of the library. The ``fastgan`` command prints it as one line and
    exits with status 2, where any other exception keeps its traceback.
    """
