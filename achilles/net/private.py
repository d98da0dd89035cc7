"""Directories, files and locks that belong to this user alone.

Nothing loose is used: what has another owner, is a link, or is open to others is refused,
with the command that fixes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shlex
import stat
from pathlib import Path
from time import monotonic, sleep

from achilles.errors import ConfigError, KeyFileError

FILE_MAX = 64 * 1024
DYING_SECONDS = 5.0  # for a broker whose parent has ended


def private_directory(path: Path) -> Path:
    """Make sure that ``path`` is a directory of this user alone.

    Raises:
        KeyFileError: it is not, or cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        pass  # a file or a dangling link, which the next line tells
    except OSError as error:
        raise KeyFileError(f"cannot make the directory {path}: {error.strerror}") from None
    return check_directory(path)


def check_directory(path: Path) -> Path:
    """Check that ``path`` is a directory of this user alone.

    Raises:
        FileNotFoundError: there is none.
        KeyFileError: it is not.
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(path)) from None
    except OSError as error:
        raise KeyFileError(f"cannot use the directory {path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise KeyFileError(f"{path} is a link or a file; achilles needs a directory there")
    _check_owner(path, status)
    if status.st_mode & 0o077:
        raise KeyFileError(f"{path} is open to others; close it with: chmod 700 {_quote(path)}")
    return path


def read_private(path: Path, size_max: int = FILE_MAX) -> bytes:
    """The content of a file that nobody else could have read or written.

    Raises:
        FileNotFoundError: there is none.
        KeyFileError: it is loose, or larger than ``size_max``.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            text = f"{path} is a link, which achilles does not follow; put the file there"
            raise KeyFileError(text) from None
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"{path} is not a plain file")
        _check_owner(path, status)
        if status.st_mode & 0o077:
            raise KeyFileError(f"{path} is open to others; close it with: chmod 600 {_quote(path)}")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(size_max + 1)
    finally:
        os.close(fd)
    if len(data) > size_max:
        raise KeyFileError(f"{path} is larger than a file of ours can be ({size_max} bytes)")
    return data


def write_private(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file for this user alone, whole or not at all;
    without ``replace``, one that is there stands.

    Raises:
        KeyFileError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    except FileExistsError:
        pass  # another process was faster: its file stands
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class BrokerLock:
    """Holds a run directory for one broker; a second would take its sockets and join files without
    a word.
    """

    def __init__(self, path: Path, pid: int | None = None) -> None:
        """Take the lock; a dead broker's is free, or is soon.
        ``pid``: the process that users know, by default this one.

        Raises:
            ConfigError: another broker holds it, or it cannot be made.
        """
        self._path = path
        self.has_waited = False
        while True:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._fd = os.open(path, flags, 0o600)
            except OSError as error:
                raise KeyFileError(f"cannot open {path}: {error.strerror}") from None
            self._lock()
            if self._is_in_place():
                break
            os.close(self._fd)  # its last holder removed it while we waited to open it
        holder = str(pid or os.getpid()).encode()
        if (
            os.pread(self._fd, 32, 0) != holder
        ):  # a broker's next process finds it so, and the disk may be full
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, holder, 0)

    def release(self) -> None:
        """Give it up, and remove the file."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._fd)

    def _lock(self) -> None:
        deadline = monotonic() + DYING_SECONDS
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
                if not _has_ended(holder) or monotonic() > deadline:
                    break
                self.has_waited = True  # its parent was killed, and it is about to follow
                sleep(0.01)
            else:
                return
        os.close(self._fd)
        raise ConfigError(
            f"an achilles broker of yours runs already (pid {holder or 'unknown'}, with {self._path.parent}); "
            "end it with: achilles shutdown, or give this one an ACHILLES_HOME of its own"
        ) from None

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
        except FileNotFoundError:
            return False


def _has_ended(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OverflowError, PermissionError):
        return False
    return False


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.getuid():
        raise KeyFileError(
            f"{path} belongs to user {status.st_uid}, not to you ({os.getuid()}); "
            f"take it over with: sudo chown {os.getuid()} {_quote(path)}"
        )


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
