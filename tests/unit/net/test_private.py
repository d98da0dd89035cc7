from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from achilles.errors import ConfigError, KeyFileError
from achilles.net.private import (
    FILE_MAX,
    BrokerLock,
    check_directory,
    private_directory,
    read_private,
    write_private,
)
from tests.security.attacks import attack


def test_a_private_directory_is_made_with_its_parents(achilles_home: Path) -> None:
    made = private_directory(achilles_home / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_directory(made) == made
    assert check_directory(made) == made


@attack("T7", "T8")
def test_a_loose_directory_is_refused_with_the_command_that_closes_it(tmp_path: Path) -> None:
    loose = tmp_path / "it is loose"
    loose.mkdir()
    loose.chmod(0o750)
    with pytest.raises(KeyFileError, match=f"close it with: chmod 700 '{loose}'"):
        private_directory(loose)
    loose.chmod(0o700)
    assert private_directory(loose) == loose


@attack("T7")
def test_a_link_or_a_file_is_no_private_directory(achilles_home: Path) -> None:
    (achilles_home / "real").mkdir(mode=0o700)
    (achilles_home / "link").symlink_to("real")
    (achilles_home / "dangling").symlink_to("nothing")
    (achilles_home / "file").touch()
    for name in ("link", "dangling", "file"):
        with pytest.raises(KeyFileError, match=f"{name} is a link or a file"):
            private_directory(achilles_home / name)
    with pytest.raises(KeyFileError, match="cannot make the directory"):
        private_directory(achilles_home / "file" / "below")


def test_a_directory_that_is_not_there_is_told_apart(achilles_home: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_directory(achilles_home / "nothing")


def test_a_directory_of_somebody_else_is_refused(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(KeyFileError, match=rf"belongs to user {owner}, not to you .*chown"):
        private_directory(achilles_home)


def test_a_directory_that_cannot_be_made_is_named(achilles_home: Path) -> None:
    with pytest.raises(KeyFileError, match=r"cannot make the directory /proc/.*: "):
        private_directory(Path("/proc/achilles/x"))


def test_a_private_file_is_written_whole_for_its_owner_alone(achilles_home: Path) -> None:
    path = achilles_home / "file"
    write_private(path, b"one", replace=False)
    assert path.stat().st_mode & 0o777 == 0o600
    write_private(path, b"two", replace=False)
    assert read_private(path) == b"one", "the first stands"
    write_private(path, b"two", replace=True)
    assert read_private(path) == b"two"
    assert os.listdir(achilles_home) == ["file"], "nothing temporary is left"


def test_a_file_that_cannot_be_written_is_named(achilles_home: Path) -> None:
    with pytest.raises(KeyFileError, match=r"cannot write .*/nothing/file: No such file"):
        write_private(achilles_home / "nothing" / "file", b"", replace=True)


@attack("T8")
def test_a_loose_file_is_refused_with_the_command_that_closes_it(achilles_home: Path) -> None:
    path = achilles_home / "file"
    path.touch(0o600)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match=f"open to others; close it with: chmod 600 {path}"):
        read_private(path)


@attack("T8")
def test_what_is_no_plain_file_is_refused(achilles_home: Path) -> None:
    (achilles_home / "real").touch(0o600)
    (achilles_home / "link").symlink_to("real")
    os.mkfifo(achilles_home / "pipe", 0o600)
    (achilles_home / "folder").mkdir(0o700)
    (achilles_home / "large").write_bytes(bytes(FILE_MAX + 1))
    (achilles_home / "large").chmod(0o600)
    for name, wanted in (
        ("link", "is a link, which achilles does not follow"),
        ("pipe", "is not a plain file"),
        ("folder", "is not a plain file"),
        ("large", "is larger than a file of ours can be"),
    ):
        with pytest.raises(KeyFileError, match=wanted):
            read_private(achilles_home / name)
    with pytest.raises(FileNotFoundError):
        read_private(achilles_home / "nothing")


def test_a_file_may_have_a_limit_of_its_own(achilles_home: Path) -> None:
    path = achilles_home / "file"
    write_private(path, bytes(FILE_MAX + 1), replace=True)
    assert len(read_private(path, FILE_MAX + 1)) == FILE_MAX + 1
    with pytest.raises(KeyFileError, match=rf"larger than a file of ours can be \({FILE_MAX} byt"):
        read_private(path, FILE_MAX)


def test_a_lock_is_held_by_one(achilles_home: Path) -> None:
    path = achilles_home / "broker.lock"
    lock = BrokerLock(path)
    wanted = rf"runs already \(pid {os.getpid()}, with {achilles_home}\); end it with: achilles"
    with pytest.raises(ConfigError, match=wanted):
        BrokerLock(path)
    lock.release()
    assert not path.exists()
    BrokerLock(path).release()


def test_the_lock_of_a_dead_broker_is_free(achilles_home: Path) -> None:
    (achilles_home / "broker.lock").write_text("4194305")
    BrokerLock(achilles_home / "broker.lock").release()


def test_a_lock_file_that_was_removed_meanwhile_does_not_count(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two brokers would hold it: one the removed file, another a new one."""
    path = achilles_home / "broker.lock"
    real = fcntl.flock
    calls: list[int] = []

    def flock(fd: int, operation: int) -> None:
        if not calls:
            path.unlink()  # the last holder's release, just after we have opened the file
        calls.append(fd)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = BrokerLock(path)
    assert len(calls) == 2
    with pytest.raises(ConfigError, match="runs already"):
        BrokerLock(path)
    lock.release()


def test_a_lock_that_cannot_be_made_is_named(achilles_home: Path) -> None:
    (achilles_home / "broker.lock").symlink_to("elsewhere")
    with pytest.raises(KeyFileError, match=r"cannot open .*broker\.lock"):
        BrokerLock(achilles_home / "broker.lock")
