"""Run commands in this process, and look at what they say."""

from typer.testing import CliRunner

from fastgan.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fastgan: error: ")
    for part in parts:
        assert str(part) in lines[0]
