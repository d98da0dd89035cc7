from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest

from achilles import config
from achilles.config import SETTINGS, Settings, cores, example, home, load
from achilles.core import protocol
from achilles.errors import ConfigError
from tests.security.attacks import attack

ROOT = Path(__file__).parents[2]


def load_text(tmp_path: Path, text: str, **environ: str) -> Settings:
    file = tmp_path / "some.toml"
    file.write_text(text)
    return load(file, environ=environ)


def test_defaults_are_in_force_without_file_and_environment(tmp_path: Path) -> None:
    settings = load(environ={"ACHILLES_HOME": str(tmp_path)}, cwd=tmp_path)
    assert [(key, value) for key, value, _ in settings.items()] == [
        (setting.key, setting.default) for setting in SETTINGS
    ]
    assert {origin for _, _, origin in settings.items()} == {"default"}
    assert repr(settings) == "<Settings defaults>"


def test_a_flag_precedes_the_environment_which_precedes_the_file(tmp_path: Path) -> None:
    text = 'address = "tcp://a:1"\n[broker]\ngrace = "3s"\n[worker]\nslots = 3'
    settings = load_text(tmp_path, text, ACHILLES_ADDRESS="tcp://b:1", ACHILLES_WORKER_SLOTS="4")
    settings.override("worker.slots", 5, "--slots")
    assert (settings["worker.slots"], settings.origin("worker.slots")) == (5, "--slots")
    assert (settings["address"], settings.origin("address")) == ("tcp://b:1", "ACHILLES_ADDRESS")
    assert (settings["broker.grace"], settings.origin("broker.grace")) == (
        3.0,
        str(tmp_path / "some.toml"),
    )
    assert settings.origin("broker.credit") == "default"
    assert repr(settings) == "<Settings address, broker.grace, worker.slots>"


def test_the_first_file_that_exists_is_read(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("flag", "variable", "cwd", "home")}
    for name, place in places.items():
        place.mkdir()
        (place / "achilles.toml").write_text(f'address = "{name}"')
    named = str(places["variable"] / "achilles.toml")
    environ = {"ACHILLES_HOME": str(places["home"])}
    cwd = places["cwd"]
    assert load(places["flag"] / "achilles.toml", environ=environ)["address"] == "flag"
    assert load(environ={**environ, "ACHILLES_CONFIG": named}, cwd=cwd)["address"] == "variable"
    assert load(environ=environ, cwd=cwd)["address"] == "cwd"
    assert load(environ=environ, cwd=tmp_path)["address"] == "home"


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    environ = {"ACHILLES_ADDRESS": "", "ACHILLES_CONFIG": "", "ACHILLES_HOME": str(tmp_path)}
    assert load(environ=environ, cwd=tmp_path).origin("address") == "default"


def test_a_path_in_a_file_is_relative_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to where a program is started, which the environment and flags are about."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for text, wanted in (
        ("client.join", folder / "client.join"),
        ("../client.join", folder / ".." / "client.join"),
        ("/etc/client.join", Path("/etc/client.join")),
        ("~/client.join", tmp_path / "me" / "client.join"),
    ):
        (folder / "achilles.toml").write_text(f'join = "{text}"')
        for cwd in (folder, tmp_path):
            monkeypatch.chdir(cwd)
            file = os.path.relpath(folder / "achilles.toml")
            assert load(file, environ={})["join"] == str(wanted)
    monkeypatch.chdir(folder)
    assert load(environ={"ACHILLES_JOIN": "a/client.join"})["join"] == "a/client.join"


@pytest.mark.parametrize(
    ("given", "address", "join", "meant"),
    [
        (None, None, None, None),
        ("", "", "", None),
        (None, None, "a.join", "auto"),
        (None, "tcp://b:1", "a.join", "tcp://b:1"),
        ("tcp://c:1", "tcp://b:1", "a.join", "tcp://c:1"),
        ("auto", "embedded", None, "auto"),
        (None, "embedded", "a.join", None),
        ("embedded", "tcp://b:1", "a.join", None),
        ("Embedded", None, None, "Embedded"),
    ],
)
def test_the_address_that_is_meant(
    tmp_path: Path, given: str | None, address: str | None, join: str | None, meant: str | None
) -> None:
    environ = {"ACHILLES_ADDRESS": address or "", "ACHILLES_JOIN": join or ""}
    assert load_text(tmp_path, "", **environ).broker_address(given) == meant


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2", 2.0), ("2.5", 2.5), ("500ms", 0.5), ("30s", 30.0), (" 5 m ", 300.0), ("1h", 3600.0)],
)
def test_durations_have_units(tmp_path: Path, text: str, seconds: float) -> None:
    variable = load_text(tmp_path, "", ACHILLES_CLIENT_BROKER_TIMEOUT=text)
    file = load_text(tmp_path, f'[client]\nbroker_timeout = "{text}"')
    assert variable["client.broker_timeout"] == file["client.broker_timeout"] == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("2097152", 2 << 20), ("1.5GiB", 3 << 29), (" 300 MiB ", 300 << 20)]
)
def test_sizes_have_units(tmp_path: Path, text: str, size: int) -> None:
    variable = load_text(tmp_path, "", ACHILLES_WORKER_MEMORY_LIMIT=text)
    file = load_text(tmp_path, f'[worker]\nmemory_limit = "{text}"')
    assert variable["worker.memory_limit"] == file["worker.memory_limit"] == size


def test_texts_are_separated_by_commas_in_the_environment(tmp_path: Path) -> None:
    assert load_text(tmp_path, "", ACHILLES_WORKER_TAGS="gpu, big,")["worker.tags"] == (
        "gpu",
        "big",
    )
    assert load_text(tmp_path, '[worker]\ntags = ["gpu"]')["worker.tags"] == ("gpu",)
    assert load_text(tmp_path, "", ACHILLES_CLIENT_RESULTS=",")["client.results"] == ()


@attack("T34")
@pytest.mark.bad_input(42, 75)
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('adress = "x"', r"unknown setting 'adress' in .*some\.toml; did you mean address\?"),
        ("[broker]\nbnd = 1", r"unknown setting 'broker\.bnd' .*did you mean broker\.bind\?"),
        ("[worker]\nbind = 'x'", r"'worker\.bind' .*did you mean broker\.bind\?"),
        ("slots = 2", r"'slots' .*did you mean worker\.slots\?"),
        ("[brokr]\nbind = 'x'", r"'brokr' .*did you mean \[broker\]\?"),
        ("broker = 1", r"broker in .*some\.toml must be a section: \[broker\]"),
        ("zzz = 1", r"unknown setting 'zzz' in \S+some\.toml$"),
        ('"a\\nb" = 1', r"unknown setting 'a\\nb'"),
        ("address = 5", r"address must be a line of text, not 5, in .*some\.toml"),
        ('address = ""', "address must be a line of text, not ''"),
        ('address = "a\\nb"', r"address must be a line of text, not 'a\\nb'"),
        ("[broker.bind]\nx = 1", "broker.bind must be a line of text"),
        ("[worker]\nslots = true", "worker.slots must be an integer, not True"),
        ("[worker]\nslots = 2.0", "worker.slots must be an integer, not 2.0"),
        ("[worker]\nslots = 0", "worker.slots must be at least 1, not 0"),
        ("[worker]\nslots = 99999", "worker.slots must be at most 4096, not 99999"),
        (f"[worker]\nname = '{'x' * 201}'", "worker.name must be at most 200 characters long"),
        ("[worker]\ntags = 'gpu'", "worker.tags must be a list of texts"),
        ("[client]\nresults = ['not a name']", "client.results must be a list of names like"),
        ("[client]\nresults = ['a..b']", "client.results must be a list of names like"),
        ("[broker]\nmemory = 5", "broker.memory must be at least 64MiB, not 5"),
        ("[brocker]\nbind = 'x'", r"unknown section 'brocker' in .*; did you mean \[broker\]\?"),
        ("[worker]\ntags = ['a', 1]", "worker.tags must be a list of texts"),
        (f"[worker]\ntags = {['x'] * 65}", "worker.tags must be a list of at most 64 texts"),
        ("[broker]\ncredit = 10000000000", "broker.credit must be at most 1000000000"),
        (
            "[worker]\nmemory_limit = '4 elephants'",
            'worker.memory_limit must be a size like "256MiB"',
        ),
        ("[worker]\nmemory_limit = true", "worker.memory_limit must be a size"),
        ("[worker]\nmemory_limit = '1KiB'", "worker.memory_limit must be at least 1"),
        ("[broker]\ngrace = true", "broker.grace must be a duration"),
        ("[broker]\ngrace = '3 parsecs'", 'broker.grace must be a duration like "30s"'),
        ("[broker]\ngrace = nan", "broker.grace must be a duration"),
        ("[broker]\ngrace = -1", "broker.grace must be at least 0, not -1"),
        ("[broker]\ngrace = inf", "broker.grace must be a duration"),
        (f"[broker]\ngrace = 1{'0' * 400}", "broker.grace must be a duration"),
        (
            "[broker]\nlost_after = 2",
            "lost_after .* at least three times broker.heartbeat_interval",
        ),
        ("[broker]\nsuspect_after = 20", "suspect_after .* must lie between"),
        ("[logging]\nlevel = 'inof'", "must be one of debug, info, .*did you mean info"),
        ("[logging]\nlevel = ['info']", "logging.level must be one of"),
        ("a = ", r"some\.toml is not valid TOML"),
        (f"a = {'1' * 5000}", r"some\.toml is not valid TOML"),
        (f"a = {'[' * 50_000}", r"some\.toml is not valid TOML"),
        (f"# {'x' * (1 << 20)}", "larger than a configuration can be"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_name(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as caught:
        load_text(tmp_path, text)
    assert len(str(caught.value)) < 400


@pytest.mark.bad_input(75)
@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("ACHILLES_WORKER_SLOTS", "four", r"worker\.slots must be an integer, not 'four', in the"),
        ("ACHILLES_WORKER_SLOTS", "1e3", r"the environment \(ACHILLES_WORKER_SLOTS\)"),
        ("ACHILLES_WORKER_SLOTS", "9" * 5000, "worker.slots must be an integer"),
        ("ACHILLES_BROKER_GRACE", "soon", "broker.grace must be a duration"),
        ("ACHILLES_BROKER_GRACE", "9" * 400, "broker.grace must be at most 100000000"),
        (
            "ACHILLES_WORKER_TAGS",
            '["a"]',
            r"worker\.tags must be texts with commas between them, not",
        ),
        ("ACHILLES_CLIENT_RESULTS", ' ["numpy"]', r"client\.results must be texts with commas "),
        ("ACHILLES_CLIENT_RESULTS", "[]", "a comma alone is none"),
        ("ACHILLES_LOGGING_LEVEL", "DEBUG", "must be one of debug"),
        ("ACHILLES_ADDRESS", "\x1b[31m", "must be a line of text"),
        ("ACHILLES_ADRESS", "x", "unknown setting ACHILLES_ADRESS .*mean ACHILLES_ADDRESS"),
        ("ACHILLES_LOG_LEVEL", "debug", "did you mean ACHILLES_LOGGING_LEVEL"),
        ("ACHILLES_BROKER_ZZZ", "x", "unknown setting ACHILLES_BROKER_ZZZ"),
        ("ACHILLES_HOMME", "x", "did you mean ACHILLES_HOME"),
        ("ACHILLES_CONFIG", "/nowhere", "there is no configuration file '/nowhere'; .* init"),
    ],
)
def test_a_variable_that_cannot_be_is_refused_by_name(
    tmp_path: Path, name: str, text: str, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load(environ={"ACHILLES_HOME": str(tmp_path), name: text}, cwd=tmp_path)


def test_variables_of_others_are_let_be(tmp_path: Path) -> None:
    load(environ={"ACHILLES_HOME": str(tmp_path), "ACHILLES_SPEAR_LENGTH": "5"}, cwd=tmp_path)


@attack("T34")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "achilles.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"achilles\.toml is not text in UTF-8"):
        load(tmp_path / "achilles.toml")
    with pytest.raises(ConfigError, match="is a directory, not a configuration file"):
        load(tmp_path)


def test_no_file_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "achilles.toml").write_text("broken")
    assert load("/dev/null", environ={}, cwd=tmp_path)["broker.credit"] == 100_000


def test_an_override_that_cannot_be_is_refused(tmp_path: Path) -> None:
    settings = load_text(tmp_path, "")
    with pytest.raises(ConfigError, match=r"worker\.slots must be at least 1, not 0, in --slots"):
        settings.override("worker.slots", 0, "--slots")
    with pytest.raises(ConfigError, match="lost_after"):
        settings.override("broker.lost_after", 1, "a test")


def test_the_example_file_is_the_generated_one() -> None:
    assert (ROOT / "achilles.toml.example").read_text("utf-8") == example()


def test_the_example_is_valid_as_it_is_and_uncommented(tmp_path: Path) -> None:
    assert repr(load_text(tmp_path, example())) == "<Settings defaults>"
    bare = re.sub(r"^# (\w+ = )", r"\1", example(), flags=re.MULTILINE)
    settings = load_text(tmp_path, bare)
    for setting in SETTINGS:
        assert settings.origin(setting.key) != "default", f"{setting.key} is not in the example"
        assert settings[setting.key] == setting.default or setting.default is None


def test_what_the_protocol_takes_can_be_set_and_no_more() -> None:
    """Settings are read without the core, so its limits are written twice."""
    for name in ("NAME_MAX", "SLOTS_MAX", "TAG_MAX", "TAGS_MAX"):
        assert getattr(config, name) == getattr(protocol, name)


def test_variables_have_distinct_names() -> None:
    for one, other in itertools.combinations(SETTINGS, 2):
        assert one.variable != other.variable


def test_home_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    assert home({"ACHILLES_HOME": "~/x"}) == tmp_path / "x"
    assert home({"ACHILLES_HOME": "x"}) == tmp_path / "x"
    assert home({"XDG_CONFIG_HOME": "/etc"}) == Path("/etc/achilles")
    assert home({"XDG_CONFIG_HOME": "relative"}) == tmp_path / ".config" / "achilles"
    monkeypatch.setattr("sys.platform", "darwin")
    assert home({}) == tmp_path / "Library" / "Application Support" / "achilles"


@pytest.mark.bad_input(60)
def test_home_of_nobody_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ACHILLES_HOME"):
        home({"ACHILLES_HOME": "~nobody-of-that-name/x"})

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="no home directory; name one with ACHILLES_HOME"):
        home({})
    load(environ={}, cwd=tmp_path)  # embedded mode needs none


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores() >= 1
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
