"""Settings: one table of what can be set, and where a value came from.

Precedence: an argument or flag, then ``ACHILLES_*`` in the environment, then one TOML file, then
the default. The file is the first of: the one that was named (``--config``, ``config=``),
``$ACHILLES_CONFIG``, ``./achilles.toml``, the one in `home`, ``/etc/achilles/achilles.toml``. A
variable that is empty counts as not set.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from achilles.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_MAX = 1 << 20
NAME = "achilles.toml"
LEVELS = ("debug", "info", "warning", "error")
EMBEDDED = "embedded"  # the address of no broker

DURATION_MAX = 1e8  # three years; what waits for a descriptor could not count much further
COUNT_MAX = 1_000_000_000
SLOTS_MAX = 4096  # the protocol's limit
NAME_MAX = 200  # characters, the protocol's limit
TAGS_MAX, TAG_MAX = 64, 64  # the protocol's limits

_MIB = 1 << 20
SIZE_MAX = 1 << 50
FRAME_MIN = 10 * _MIB  # peers send parts of 8 MiB

_SIZES = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": _MIB,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*")
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_OTHER_VARIABLES = ("ACHILLES_HOME", "ACHILLES_CONFIG", "ACHILLES_WATCH_MEMORY")


# A duration is in seconds, a size in bytes, a choice one of ``choices``; names are those of modules
# and of what is in them; a path in a file is relative to the file's folder.
Kind = Literal["text", "path", "integer", "duration", "size", "tags", "names", "choice"]


class Setting(NamedTuple):
    """One setting."""

    key: str
    kind: Kind
    default: Any
    doc: str
    minimum: float = 0
    maximum: float = COUNT_MAX
    choices: tuple[str, ...] = ()
    sample: str = ""  # for the example file, where there is no default

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return "ACHILLES_" + self.key.replace(".", "_").upper()


def _duration(key: str, default: float, minimum: float, doc: str) -> Setting:
    return Setting(key, "duration", default, doc, minimum, DURATION_MAX)


def _size(key: str, default: int, minimum: int, doc: str) -> Setting:
    return Setting(key, "size", default, doc, minimum, SIZE_MAX)


SETTINGS = (
    Setting(
        "address",
        "text",
        None,
        'The broker: tcp://host:port, or "auto" for your own; "embedded": none, tasks run where the program does.',
        sample='"auto"',
    ),
    Setting(
        "join",
        "path",
        None,
        "A join file of another host's broker, instead of your own running one's; here, relative to this file's folder.",
        sample='"client.join"',
    ),
    Setting("broker.bind", "text", "tcp://127.0.0.1:5555", "Where it listens for clients."),
    Setting(
        "broker.advertise",
        "text",
        None,
        "What other hosts call this one; by default the host that it binds to, or its name.",
        sample='"broker.example.org"',
    ),
    _duration("broker.heartbeat_interval", 1.0, 0.01, "How often peers show that they live."),
    _duration("broker.suspect_after", 5.0, 0.01, "Silence after which a worker gets no new work."),
    _duration(
        "broker.lost_after", 15.0, 0.03, "Silence after which a worker's work runs elsewhere."
    ),
    _duration(
        "broker.grace",
        2.0,
        0.0,
        "How long a worker whose connection closed may take to come back before its work runs elsewhere.",
    ),
    Setting(
        "broker.restarts", "integer", 5, "Crashes within a minute after which a broker gives up.", 0
    ),
    Setting("broker.credit", "integer", 100_000, "Tasks without a result, for each client.", 1),
    _size(
        "broker.client_bytes",
        256 * _MIB,
        _MIB,
        "Bytes of arguments of one client's tasks without a result.",
    ),
    _size("broker.argument_max", 1 << 30, _MIB, "Bytes of one task's arguments."),
    _size("broker.result_max", 1 << 30, _MIB, "Bytes of one task's result."),
    _size("broker.frame_max", 16 * _MIB, FRAME_MIN, "Bytes of one frame, from anybody."),
    _size(
        "broker.memory",
        2 << 30,
        64 * _MIB,
        "Memory that the broker may use; above it, it ends the connection or session that holds most.",
    ),
    Setting("broker.sessions", "integer", 10_000, "Clients and workers at once.", 1),
    Setting(
        "broker.unauthenticated",
        "integer",
        2_048,
        "Connections at once that have not shown a key yet.",
        1,
    ),
    _duration(
        "broker.hello_timeout",
        5.0,
        0.1,
        "How long a connection may last without a session; it may shake hands for as long again.",
    ),
    Setting(
        "worker.slots",
        "integer",
        None,
        "Tasks at once; by default one for each core.",
        1,
        SLOTS_MAX,
        sample="4",
    ),
    Setting(
        "worker.name",
        "text",
        None,
        "What it is called; by default its host and process.",
        maximum=NAME_MAX,
        sample='"alpha"',
    ),
    Setting(
        "worker.output",
        "choice",
        "client",
        "Where what tasks print goes: to their client, or where the worker prints.",
        choices=("client", "worker"),
    ),
    Setting(
        "worker.memory_limit",
        "size",
        None,
        "Memory that a runner may take for itself; its task fails beyond that. No limit by default.",
        1 << 20,
        1 << 60,
        sample='"4GiB"',
    ),
    Setting("worker.tags", "tags", (), "What it offers, for tasks that ask for it."),
    Setting(
        "client.max_workers",
        "integer",
        None,
        "Tasks of one executor at once, an embedded one, too; by default as many as there are slots.",
        1,
        sample="4",
    ),
    Setting(
        "client.output",
        "choice",
        "print",
        "Whether what tasks print on workers is printed here, or dropped.",
        choices=("print", "drop"),
    ),
    Setting(
        "client.results",
        "names",
        None,
        "What results may contain besides plain data: modules and names. []: plain data only. Unset: anything, so whoever holds a worker's keys can run code in this program.",
        sample='["numpy", "mypackage.types"]',
    ),
    _duration("client.connect_timeout", 10.0, 0.01, "How long to look for a broker at the start."),
    _duration(
        "client.broker_timeout", 60.0, 0.01, "How long a broker may be away before tasks fail."
    ),
    Setting(
        "logging.level",
        "choice",
        "info",
        "What is logged.",
        choices=LEVELS,
    ),
    Setting("logging.format", "choice", "text", "How log lines look.", choices=("text", "json")),
)
_BY_KEY = {setting.key: setting for setting in SETTINGS}
_SECTIONS = {key.partition(".")[0] for key in _BY_KEY if "." in key}
_SECTION_DOCS = {
    "broker": "achilles broker",
    "worker": "achilles worker",
    "client": "programs and commands that use a broker",
    "logging": "the commands' own log",
}


class Settings:
    """All settings with their origins."""

    def __init__(self, values: dict[str, Any], origins: dict[str, str]) -> None:
        self._values = values
        self._origins = origins

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def origin(self, key: str) -> str:
        """Where the value came from: "default", a file, or a variable of the environment."""
        return self._origins[key]

    def items(self) -> list[tuple[str, Any, str]]:
        """Every setting: its key, value and origin."""
        return [(key, self._values[key], self._origins[key]) for key in _BY_KEY]

    def broker_address(self, given: str | None = None) -> str | None:
        """The address that an executor means which was given that one; None: it is embedded.

        A join file that is named is an address, too, where no other is.
        """
        address = given or self["address"] or ("auto" if self["join"] else None)
        return None if address == EMBEDDED else address

    def override(self, key: str, value: Any, origin: str) -> None:
        """Set a value that takes precedence.

        Raises:
            ConfigError: the value cannot be.
        """
        self._values[key] = _convert(_BY_KEY[key], value, origin)
        self._origins[key] = origin
        _check_relations(self)

    def __repr__(self) -> str:
        changed = [key for key, origin in self._origins.items() if origin != "default"]
        return f"<Settings {', '.join(changed) or 'defaults'}>"


def home(environ: Mapping[str, str] | None = None) -> Path:
    """The directory of settings, keys and join files, ``$ACHILLES_HOME``; it need not exist yet.

    Raises:
        ConfigError: it cannot be told.
    """
    environ = os.environ if environ is None else environ
    try:
        if value := environ.get("ACHILLES_HOME"):
            return Path(value).expanduser().absolute()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "achilles"
        base = Path(environ.get("XDG_CONFIG_HOME") or "")
        return (base if base.is_absolute() else Path.home() / ".config") / "achilles"
    except RuntimeError:  # no HOME, and no such user
        raise ConfigError("there is no home directory; name one with ACHILLES_HOME") from None


def cores() -> int:
    """How many cores this process may use."""
    count = getattr(os, "process_cpu_count", None)  # Python 3.13 on
    if count is not None:
        return count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Settings:
    """The settings of this process.

    Raises:
        ConfigError: a file or a variable that cannot be used, with key,
            origin and the nearest valid key.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {setting.key: setting.default for setting in SETTINGS}
    origins = dict.fromkeys(values, "default")
    file = _find(path, environ, cwd or Path("."))
    if file is not None:
        for key, value in _flatten(_read(file), file).items():
            setting = _BY_KEY[key]
            value = _convert(setting, value, str(file))
            values[key] = _beside(file, value) if setting.kind == "path" else value
            origins[key] = str(file)
    _check_variables(environ)
    for setting in SETTINGS:
        if text := environ.get(setting.variable):
            values[setting.key] = _from_text(setting, text)
            origins[setting.key] = setting.variable
    settings = Settings(values, origins)
    _check_relations(settings)
    return settings


def example() -> str:
    """An ``achilles.toml`` with every setting, commented out, at its default."""
    lines = [
        "# Settings of achilles. What is commented out shows the default, or an example.",
        '# Durations are seconds, or text like "30s", "5m", "200ms". A flag of a command and a variable of the',
        "# environment (ACHILLES_BROKER_BIND for bind below [broker]) take precedence over this file.",
        "",
    ]
    section = ""
    for setting in SETTINGS:
        head, _, name = setting.key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]  # {_SECTION_DOCS[section]}"]
        lines += [f"# {setting.doc}", f"# {name} = {_toml(setting)}"]
    return "\n".join(lines) + "\n"


# --- Files ----------------------------------------------------------------------------------------


def _find(
    path: str | os.PathLike[str] | None, environ: Mapping[str, str], cwd: Path
) -> Path | None:
    """The file to read; None if there is none.

    Raises:
        ConfigError: the file that was named does not exist.
    """
    named = path if path is not None else environ.get("ACHILLES_CONFIG") or None
    if named is not None:
        if os.path.isdir(named):
            raise ConfigError(f"{os.fspath(named)!r} is a directory, not a configuration file")
        if not os.path.exists(named):
            raise ConfigError(
                f"there is no configuration file {os.fspath(named)!r}; write one with: achilles init"
            )
        return Path(named)
    candidates = [cwd / NAME, Path("/etc/achilles") / NAME]
    with contextlib.suppress(ConfigError):  # embedded mode needs no home
        candidates.insert(1, home(environ) / NAME)
    return next((file for file in candidates if os.path.isfile(file)), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_MAX + 1)
        if len(data) > FILE_MAX:
            raise ConfigError(f"{file} is larger than a configuration can be ({FILE_MAX} bytes)")
        table: dict[str, Any] = tomllib.loads(data.decode())
        return table
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:  # numbers and nesting without bounds, too
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None


def _flatten(table: dict[str, Any], file: Path) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise ConfigError(f"{key} in {file} must be a section: [{key}]")
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    for key, value in flat.items():
        if key not in _BY_KEY and isinstance(value, dict):
            near = difflib.get_close_matches(key, _SECTIONS, n=1)
            hint = f"; did you mean [{near[0]}]?" if near else ""
            raise ConfigError(f"unknown section {_short(key)} in {file}{hint}")
        if key not in _BY_KEY:
            raise ConfigError(f"unknown setting {_short(key)} in {file}{_nearest(key, _BY_KEY)}")
    return flat


def _beside(file: Path, path: str) -> str:
    """The path, where it is relative, as seen from the file's folder;
    programs and commands are started in any.
    """
    return os.path.join(file.absolute().parent, os.path.expanduser(path))


def _nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    if not near:  # perhaps the right name in the wrong section, or a section with a typing error
        last = name.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == last]
    if not near:
        sections = difflib.get_close_matches(name, _SECTIONS, n=1, cutoff=0.6)
        near = [f"[{section}]" for section in sections]
    return f"; did you mean {near[0]}?" if near else ""


# --- Values ---------------------------------------------------------------------------------------


def _check_variables(environ: Mapping[str, str]) -> None:
    """Refuse variables that look like settings and are none:
    a typing error should not pass unnoticed.
    """
    known = {setting.variable for setting in SETTINGS} | set(_OTHER_VARIABLES)
    prefixes = tuple(f"ACHILLES_{section.upper()}_" for section in _SECTIONS)
    for name in environ:
        if not name.startswith("ACHILLES_") or name in known:
            continue
        tails = {other.removeprefix("ACHILLES_") for other in known}
        near = difflib.get_close_matches(name.removeprefix("ACHILLES_"), tails, n=1, cutoff=0.75)
        if near or name.startswith(prefixes):
            hint = f"; did you mean ACHILLES_{near[0]}?" if near else _nearest(name, known)
            raise ConfigError(f"unknown setting {name} in the environment{hint}")


def _from_text(setting: Setting, text: str) -> Any:
    """A value from the environment."""
    where = f"the environment ({setting.variable})"
    value: Any = text
    if setting.kind == "integer":
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text, re.ASCII):
            raise ConfigError(f"{setting.key} must be an integer, not {_short(text)}, in {where}")
        value = int(text)
    elif setting.kind in ("tags", "names"):
        if text.strip().startswith("["):  # as in a file
            raise ConfigError(
                f"{setting.key} must be texts with commas between them, not {_short(text)}, in {where}; a comma alone is none"
            )
        value = [part.strip() for part in text.split(",") if part.strip()]
    return _convert(setting, value, where)


def _short(value: object) -> str:
    """The value as an error shows it: in one line, and no longer than one."""
    return reprlib.repr(value)


def _convert(setting: Setting, value: Any, where: str) -> Any:
    """The value as it is used.

    Raises:
        ConfigError: it is of the wrong type or out of range.
    """

    def refuse(wanted: str, hint: str = "") -> NoReturn:
        raise ConfigError(f"{setting.key} must be {wanted}, not {_short(value)}, in {where}{hint}")

    match setting.kind:
        case "text" | "path":
            if not isinstance(value, str) or not value or not value.isprintable():
                refuse("a line of text")
            if len(value) > setting.maximum:
                refuse(f"at most {setting.maximum} characters long")
            return value
        case "choice":
            if value not in setting.choices:
                hint = _nearest(value, setting.choices) if isinstance(value, str) else ""
                refuse(f"one of {', '.join(setting.choices)}", hint)
            return value
        case "tags":
            if not isinstance(value, list | tuple) or not all(map(_is_tag, value)):
                refuse(f"a list of texts of 1 to {TAG_MAX} characters")
            if len(value) > TAGS_MAX:
                refuse(f"a list of at most {TAGS_MAX} texts")
            return tuple(value)
        case "names":
            if not isinstance(value, list | tuple) or not all(map(_is_name, value)):
                refuse('a list of names like "numpy" or "mypackage.types.Point"')
            return tuple(value)
        case "integer":
            if isinstance(value, bool) or not isinstance(value, int):
                refuse("an integer")
        case "size":
            size = _bytes(value)
            if size is None:
                refuse(
                    f'a size like "256MiB" ({", ".join(filter(None, _SIZES))}) or a number of bytes'
                )
            value = size
        case "duration":
            seconds = _seconds(value)
            if seconds is None:
                refuse(f'a duration like "30s" ({", ".join(_UNITS)}) or a number of seconds')
            value = seconds
    show = size_text if setting.kind == "size" else "{:.10g}".format
    if value < setting.minimum:
        refuse(f"at least {show(setting.minimum)}")
    if value > setting.maximum:
        refuse(f"at most {show(setting.maximum)}")
    return value


def _is_tag(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= TAG_MAX and value.isprintable()


def _is_name(value: object) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def size_text(size: float) -> str:
    """A number of bytes as one writes it: "64MiB"."""
    unit = next(unit for unit in ("TiB", "GiB", "MiB", "KiB", "") if size % _SIZES[unit] == 0)
    return f"{size / _SIZES[unit]:.0f}{unit}"


def _bytes(value: object) -> int | None:
    """The bytes of a number, or of text with or without a unit; None if it is none."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        unit = _SIZES.get(match[2])
        return None if unit is None else int(Fraction(match[1]) * unit)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(value: object) -> float | None:
    """The seconds of a number, or of text with or without a unit; None if it is none."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        unit = _UNITS.get(match[2] or "s")
        return None if unit is None else float(match[1]) * unit
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _check_relations(settings: Settings) -> None:
    """Refuse values that fit each for itself, but not together."""
    interval, lost = settings["broker.heartbeat_interval"], settings["broker.lost_after"]
    suspect = settings["broker.suspect_after"]
    if lost < 3 * interval:
        raise ConfigError(
            f"broker.lost_after ({lost:g} s) must be at least three times broker.heartbeat_interval ({interval:g} s), "
            "or one late heartbeat loses a worker"
        )
    if not interval < suspect <= lost:
        raise ConfigError(
            f"broker.suspect_after ({suspect:g} s) must lie between broker.heartbeat_interval ({interval:g} s) "
            f"and broker.lost_after ({lost:g} s)"
        )


def _toml(setting: Setting) -> str:
    value = setting.default
    if value is None:
        return setting.sample
    if isinstance(value, tuple):
        return "[]"
    if isinstance(value, str):
        return f'"{value}"'
    if setting.kind == "size":
        return f'"{size_text(value)}"'
    return f"{value:_}" if isinstance(value, int) else f"{value:g}"
