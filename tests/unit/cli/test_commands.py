from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import achilles
from achilles.cli import main
from achilles.errors import (
    AchillesError,
    AuthenticationError,
    BrokerUnreachableError,
    ConfigError,
    InsecureBindError,
    KeyFileError,
)
from tests import commands


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 78),
        (KeyFileError, 78),
        (InsecureBindError, 2),
        (BrokerUnreachableError, 69),
        (AuthenticationError, 69),
        (AchillesError, 1),
    ],
)
def test_our_errors_are_one_line_and_an_exit_code(
    error: type[Exception], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error("what\nbroke \x1b[31m")

    monkeypatch.setitem(main.commands, "fail", click.Command("fail", callback=fail))
    done = CliRunner().invoke(main, ["fail"])
    assert done.exit_code == code
    assert done.output == "achilles: what\\nbroke \\x1b[31m\n"


def test_too_many_open_files_are_one_line_and_anything_unforeseen_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = OSError(errno.EMFILE, "Too many open files")

    def fail() -> None:
        raise error

    monkeypatch.setitem(main.commands, "fail", click.Command("fail", callback=fail))
    done = CliRunner().invoke(main, ["fail"])
    assert (done.exit_code, done.output) == (
        71,
        "achilles: too many open files; raise the limit that `ulimit -n` shows\n",
    )
    error.errno = errno.EIO
    done = CliRunner().invoke(main, ["fail"])
    assert done.exception is error


def _options(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    """Each command with each of its options."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from ((path, option) for option in (*parameter.opts, *parameter.secondary_opts))
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield path, name
            yield from _options(inner, f"{path} {name}")


def test_the_reference_has_every_command_and_option() -> None:
    text = (Path(__file__).parents[3] / "docs" / "commands.md").read_text()
    missing = [
        f"{path}: {word}"
        for path, word in _options(main, "achilles")
        if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)
    ]
    assert not missing


@pytest.mark.bad_input(75)
@pytest.mark.parametrize(
    ("arguments", "environ", "code", "wanted"),
    [
        (["--config", "nowhere.toml", "status"], {}, 78, "no configuration file 'nowhere.toml'"),
        (["status"], {"ACHILLES_CONFIG": "nowhere.toml"}, 78, "no configuration file"),
        (["status"], {"ACHILLES_LOGGING_LEVEL": "loud"}, 78, "must be one of debug"),
        (["status"], {"ACHILLES_ADRESS": "x"}, 78, "did you mean ACHILLES_ADDRESS"),
        (["--log-level", "loud", "status"], {}, 2, "'--log-level'"),
        (["--log-format", "xml", "status"], {}, 2, "'--log-format'"),
        (["statsu"], {}, 2, "No such command 'statsu'"),
        (["config"], {}, 2, "Look at the settings"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    arguments: list[str], environ: dict[str, str], code: int, wanted: str
) -> None:
    done = CliRunner().invoke(main, arguments, env=environ)
    assert done.exit_code == code, done.output
    assert wanted in done.output


def test_help_needs_no_sound_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("achilles.toml").write_text("broken")
    for name in main.commands:
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0, done.output
    assert CliRunner().invoke(main, ["status"]).exit_code == 78
    assert CliRunner().invoke(main, ["init", "other.toml"]).exit_code == 0


def test_it_says_its_version() -> None:
    done = commands.run("--version")
    assert done.stdout == f"achilles, version {achilles.__version__}\n"
    assert done.returncode == 0


def test_usage_names_the_command() -> None:
    assert "achilles" in commands.run("nonsense").stderr.splitlines()[0]
