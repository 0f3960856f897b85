"""``python -m fastgan``, the same as the ``fastgan`` command."""

from fastgan.cli import app

if __name__ == "__main__":
    app(prog_name="fastgan")
