"""``achilles init`` and ``achilles config``, and what all commands share."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from achilles.config import EMBEDDED, NAME, Settings, example, home, load
from achilles.errors import ConfigError, KeyFileError

if TYPE_CHECKING:
    from achilles.net.endpoint import Endpoint
    from achilles.net.keys import Join

FIELD_MAX = 4096  # characters of one message in the log
ANY_ARGUMENT = {"ignore_unknown_options": True}  # keys and names may begin with a dash


class Context:
    """What the group hands to its commands; the settings are read when one asks for them."""

    def __init__(
        self,
        file: str | None = None,
        log_level: str | None = None,
        log_format: str | None = None,
    ) -> None:
        self._file = file
        self._given: set[str] = set()  # by flags
        self._flags = {
            "logging.level": (log_level, "--log-level"),
            "logging.format": (log_format, "--log-format"),
        }

    @cached_property
    def settings(self) -> Settings:
        """The settings in force.

        Raises:
            ConfigError: a file or a variable that cannot be used.
        """
        settings = load(self._file)
        for key, (value, flag) in self._flags.items():
            if value is not None:
                settings.override(key, value, flag)
        return settings

    def override(self, key: str, value: object, flag: str) -> None:
        """Let a flag take precedence, unless it was not given.

        Raises:
            UsageError: its value cannot be.
        """
        if value is None or value == ():
            return
        settings = self.settings  # a bad file is not a wrong usage
        try:
            settings.override(key, value, flag)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        self._given.add(key)

    def endpoint(self, key: str, *, to_bind: bool = False) -> Endpoint:
        """The endpoint that a setting names.

        Raises:
            UsageError, ConfigError: it cannot be one; the text says where it came from.
        """
        from achilles.net.endpoint import parse_endpoint

        value = self.settings[key]
        try:
            return parse_endpoint(value, to_bind=to_bind)
        except ConfigError as error:
            self._refuse(key, str(error))

    def check_host(self, key: str) -> None:
        """Refuse a setting that is no host's name or address.

        Raises:
            UsageError, ConfigError: it is none; the text says where it came from.
        """
        from achilles.net.endpoint import parse_endpoint

        value = self.settings[key]
        try:
            if value is not None:
                parse_endpoint(f"tcp://{value}:1")
        except ConfigError:
            self._refuse(
                key, f"{value!r} is not a host's name or address (an IPv6 address in brackets)"
            )

    def _refuse(self, key: str, why: str) -> NoReturn:
        text = f"{key} from {self.settings.origin(key)}: {why}"
        if key in self._given:
            raise click.UsageError(text) from None
        raise ConfigError(text) from None

    def address(self) -> str | None:
        """The broker that is meant; None is this user's running one.

        That programs are to be embedded, as the environment or a file may say,
        does not concern commands.

        Raises:
            UsageError, ConfigError: it is no endpoint.
        """
        value = self.settings["address"]
        if value in (None, "auto") or (value == EMBEDDED and "address" not in self._given):
            return None
        return str(self.endpoint("address"))

    def join(self, role: str) -> Join:
        """The keys and addresses for a peer of that role: of the join file that is named,
        or of this user's own broker.

        Raises:
            UsageError, ConfigError: the address is no endpoint, or a join file is not in order.
            BrokerUnreachableError: no broker of this user runs there.
        """
        from achilles.net.keys import find_join, given_join

        address = self.address()
        if self.settings["join"]:
            try:
                return given_join(self.settings["join"], role, address)
            except KeyFileError as error:
                text = f"join from {self.settings.origin('join')}: {error}"
                raise KeyFileError(text) from None
        return find_join(home(), role, address)

    def start_logging(self) -> None:
        """Log to stderr, as the settings say."""
        handler = logging.StreamHandler()
        is_json = self.settings["logging.format"] == "json"
        handler.setFormatter(JsonFormatter() if is_json else LineFormatter())
        logging.basicConfig(level=self.settings["logging.level"].upper(), handlers=[handler])


def escape(text: str) -> str:
    """The text in one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A line for people, on stderr. That nobody can have it (the disk is full) ends nothing."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def count(number: int, noun: str) -> str:
    """The number with its noun: "1 task", "2 tasks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class LineFormatter(logging.Formatter):
    """One line a record, whatever is in it; a traceback's lines follow indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape(super().formatMessage(record)[:FIELD_MAX])

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"    {escape(line)}" for line in super().formatException(ei).splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage()[:FIELD_MAX],
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class StopRequests:
    """Counts SIGTERM, SIGINT and SIGHUP (unless that is ignored, as by nohup);
    ``wake`` ends the loop's wait.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last = 0
        self.wake: Callable[[], None] | None = None
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.count += 1
        self.last = number
        if self.wake is not None:
            self.wake()

    @property
    def exit_code(self) -> int:
        """What a process that was stopped by the last signal exits with if work was lost."""
        return 128 + self.last


@click.command()
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.argument("path", default=NAME, type=click.Path(path_type=Path))
def init(path: Path, force: bool) -> None:
    """Write a commented achilles.toml."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(example())
    except FileExistsError:
        text = f"{path} is there already; replace it with: achilles init --force {path}"
        raise click.ClickException(text) from None
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    click.echo(f"wrote {path}")


@click.group()
def config() -> None:
    """Look at the settings."""


@config.command()
@click.option("--origin", is_flag=True, help="Say where each value came from.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
@click.pass_obj
def show(context: Context, origin: bool, output: str) -> None:
    """Print the settings in force."""
    items = context.settings.items()
    if output == "json":
        plain = {key: value for key, value, _ in items}
        full = {key: {"value": value, "origin": source} for key, value, source in items}
        click.echo(json.dumps(full if origin else plain, indent=2))
        return
    width = max(len(key) for key, _, _ in items)
    for key, value, source in items:
        line = f"{key:<{width}}  {_cell(value):<24}"
        click.echo(f"{line}  {source}" if origin else line.rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if value == ():
        return "[]"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
