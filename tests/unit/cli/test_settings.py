from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from achilles.cli import main
from achilles.cli.settings import (
    FIELD_MAX,
    Context,
    JsonFormatter,
    LineFormatter,
    StopRequests,
    escape,
)
from achilles.config import SETTINGS, example, load
from achilles.errors import ConfigError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str, **environ: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments, env=environ)
    return done.exit_code, done.output


def test_init_writes_the_example_once(tmp_path: Path) -> None:
    assert invoke("init") == (0, "wrote achilles.toml\n")
    assert Path("achilles.toml").read_text("utf-8") == example()
    Path("achilles.toml").write_text("mine")
    code, output = invoke("init")
    assert code == 1
    assert "is there already; replace it with: achilles init --force achilles.toml" in output
    assert Path("achilles.toml").read_text() == "mine"
    assert invoke("init", "--force")[0] == 0, "where the file is damaged, too"
    assert invoke("init", "nowhere/x.toml") == (
        1,
        "Error: cannot write nowhere/x.toml: No such file or directory\n",
    )


def test_config_show_prints_what_is_in_force_and_where_it_came_from(tmp_path: Path) -> None:
    Path("achilles.toml").write_text("[worker]\nslots = 3\ntags = ['a', 'b']")
    code, output = invoke("config", "show", "--origin", ACHILLES_BROKER_GRACE="3")
    assert code == 0
    lines = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    assert lines.keys() == {setting.key for setting in SETTINGS}
    assert lines["worker.slots"] == ["3", "achilles.toml"]
    assert lines["worker.tags"] == ["a,", "b", "achilles.toml"]
    assert lines["broker.grace"] == ["3.0", "ACHILLES_BROKER_GRACE"]
    assert lines["address"] == ["-", "default"]
    code, output = invoke("--log-level", "debug", "config", "show")
    assert "logging.level" in output
    assert "debug" in output
    assert "default" not in output


def test_config_show_speaks_json() -> None:
    plain = json.loads(invoke("config", "show", "-o", "json")[1])
    assert plain == {key: list(v) if v == () else v for key, v, _ in load(environ={}).items()}
    full = json.loads(invoke("config", "show", "-o", "json", "--origin")[1])
    assert full["broker.credit"] == {"value": 100_000, "origin": "default"}


def test_a_flag_that_cannot_be_is_wrong_usage_and_a_file_bad_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = Context()
    with pytest.raises(click.UsageError, match=r"worker\.slots must be at least 1"):
        context.override("worker.slots", 0, "--slots")
    context.override("address", "nonsense", "ADDRESS")
    with pytest.raises(click.UsageError, match="address from ADDRESS: 'nonsense' is not"):
        context.address()
    monkeypatch.setenv("ACHILLES_ADDRESS", "nonsense")
    with pytest.raises(ConfigError, match="address from ACHILLES_ADDRESS: 'nonsense' is not"):
        Context().address()
    monkeypatch.setenv("ACHILLES_WORKER_SLOTS", "nonsense")
    with pytest.raises(ConfigError, match="ACHILLES_WORKER_SLOTS"):
        Context().override("worker.slots", 1, "--slots")


@pytest.mark.parametrize("value", [None, ()])
def test_a_flag_that_is_not_given_changes_nothing(value: object) -> None:
    context = Context()
    context.override("worker.tags", value, "--tag")
    assert context.settings.origin("worker.tags") == "default"


@pytest.mark.parametrize("value", [None, "auto"])
def test_the_own_broker_has_no_address(value: str | None) -> None:
    context = Context()
    context.override("address", value, "ADDRESS")
    assert context.address() is None


def test_commands_are_not_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """That programs are is nothing to them, and who says it of a command is told that it is no
    address.
    """
    monkeypatch.setenv("ACHILLES_ADDRESS", "embedded")
    assert Context().address() is None
    code, output = invoke("worker", "embedded")
    assert code == 2
    assert "address from ADDRESS: 'embedded' is not an endpoint" in output


def test_text_is_shown_without_what_a_terminal_would_obey() -> None:
    assert escape("a\nb\x1b[2J\t\x7f\u202eé\udcff") == r"a\nb\x1b[2J\t\x7f\u202eé\udcff"


def record(text: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, None)
    return logging.LogRecord("achilles.x", logging.WARNING, "", 0, text, arguments, info)


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    line = LineFormatter().format(record("peer said %s", "x\n2026 ERROR achilles: forged\x1b[0m"))
    assert "\n" not in line
    assert line.endswith(r"WARNING achilles.x: peer said x\n2026 ERROR achilles: forged\x1b[0m")
    assert len(LineFormatter().format(record("x" * 100_000))) <= FIELD_MAX


def test_a_tracebacks_lines_are_indented() -> None:
    text = LineFormatter().format(record("failed\nforged", error=ValueError("a\nforged\x1b")))
    first, *rest = text.split("\n")
    assert r"failed\nforged" in first
    assert rest == ["    ValueError: a", "    forged\\x1b"]


def test_a_record_is_one_json_object() -> None:
    text = JsonFormatter().format(record("peer said %s", "a\nb", error=ValueError("c\nd")))
    assert "\n" not in text
    fields = json.loads(text)
    assert fields.pop("ts") > 1e9
    assert fields == {
        "level": "warning",
        "logger": "achilles.x",
        "event": "peer said a\nb",
        "traceback": "ValueError: c\nd",
    }


@pytest.mark.parametrize("kind", ["text", "json"])
def test_the_log_goes_to_the_standard_error_as_the_settings_say(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Context(log_level="error", log_format=kind).start_logging()
    [handler] = root.handlers
    assert isinstance(handler.formatter, JsonFormatter if kind == "json" else LineFormatter)
    assert root.level == logging.ERROR


@pytest.fixture
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_requests_to_stop_are_counted_and_wake() -> None:
    stop = StopRequests()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.count, stop.exit_code) == (1, 143), "also before there is something to wake"
    woken: list[int] = []
    stop.wake = lambda: woken.append(stop.count)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGHUP)
    assert (stop.count, woken) == (3, [2, 3])
    assert stop.exit_code == 129


@pytest.mark.bad_input(62)
@pytest.mark.usefixtures("_handlers")
def test_a_command_that_nohup_started_outlives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequests()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.count == 0
