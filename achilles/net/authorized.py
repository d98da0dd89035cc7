"""Which keys may meet the broker, and as what.

    $ACHILLES_HOME/keys/ROLE.key          the user's own pair for each role, made on first start
    $ACHILLES_HOME/keys/authorized.json   public keys of others: machines that were given a join file, people who sent theirs

A key has one role. Its *user*, as the ZAP handler names it, is ``ROLE/FINGERPRINT``.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from achilles.errors import AchillesError, ConfigError, KeyFileError
from achilles.net.keys import ROLES, KeyPair, is_key, key_pair, make_pair, new_key_pair
from achilles.net.private import private_directory, read_private, write_private

NAME_MAX = 64
LIST_MAX = 16 << 20  # bytes of authorized.json, some 100,000 keys


class Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A public key that may meet the broker; ``added`` is a date."""

    role: str
    public: str
    name: str
    added: str

    @property
    def pair(self) -> KeyPair:
        return KeyPair(self.public.encode(), b"")

    @property
    def fingerprint(self) -> str:
        return self.pair.fingerprint

    @property
    def user(self) -> str:
        """How the ZAP handler names its holder."""
        return f"{self.role}/{self.fingerprint}"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Entry]


class Exported(NamedTuple):
    """A new key for somebody else: its entry, and the pair that only they should keep."""

    entry: Entry
    pair: KeyPair


OWN = "(your own)"  # the name of the pairs that this user's processes use


def entries(base: Path) -> list[Entry]:
    """All keys that may meet the broker, the user's own first.

    Raises:
        KeyFileError: a file is loose or damaged.
    """
    own = [Entry(role, key_pair(base, role).public.decode(), OWN, "") for role in ROLES]
    return own + _read(base)


def users(base: Path, roles: tuple[str, ...]) -> dict[bytes, str]:
    """The users of those roles by their raw public key, as a ZAP handler wants them."""
    return {entry.pair.raw_public: entry.user for entry in entries(base) if entry.role in roles}


def add(base: Path, role: str, public: str, name: str) -> Entry:
    """Let the holder of a public key meet the broker.

    Raises:
        ConfigError: it is no key, the name or key is there already, or no more fit.
        KeyFileError: a file is loose or damaged.
    """
    if not is_key(public):
        raise ConfigError(f"{public[:60]!r} is not a public key: that is 40 characters of Z85")
    return _add(base, role, public, name)


def export(base: Path, role: str, name: str) -> Exported:
    """A new key pair for another machine or person, with its public half authorized.

    Raises:
        ConfigError: the name is there already, or cannot be one, or no more keys fit.
        KeyFileError: a file is loose or damaged.
    """
    pair = make_pair()
    return Exported(_add(base, role, pair.public.decode(), name), pair)


def revoke(base: Path, which: str) -> list[Entry]:
    """Take the keys of that name or fingerprint (or its beginning) off the list;
    what was taken off.

    Raises:
        AchillesError: there is none, or it is the user's own.
        KeyFileError: a file is loose or damaged.
    """
    with _locked(base):
        present = _read(base)
        gone = [entry for entry in present if _is_meant(entry, which)]
        if not gone:
            own = next((one for one in entries(base) if one.fingerprint.startswith(which)), None)
            if own is not None and len(which) >= 8:
                raise AchillesError(
                    f"{which} is your own key; replace it with: achilles keys rotate {own.role}"
                )
            names = ", ".join(entry.name for entry in present) or "none"
            raise AchillesError(f"no key is called {which!r}; there are: {names}")
        _write(base, [entry for entry in present if entry not in gone])
    return gone


def rotate(base: Path, role: str) -> KeyPair:
    """Replace the user's own pair of a role by a new one.

    Raises:
        KeyFileError: it cannot be written.
    """
    return new_key_pair(base, role)


def _is_meant(entry: Entry, which: str) -> bool:
    return entry.name == which or (len(which) >= 8 and entry.fingerprint.startswith(which))


def _add(base: Path, role: str, public: str, name: str) -> Entry:
    if role not in ROLES:
        raise ConfigError(f"{role!r} is not a role; roles are {', '.join(ROLES)}")
    if not 0 < len(name) <= NAME_MAX or not name.isprintable() or name == OWN:
        raise ConfigError(f"a key's name has 1 to {NAME_MAX} printable characters: {name[:80]!r}")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    entry = Entry(role, public, name, today)
    with _locked(base):
        present = _read(base)
        for other in entries(base):
            if other.public == public:
                raise ConfigError(f"that key is authorized already, as {other.role} {other.name}")
            if other.name == name:
                raise ConfigError(
                    f"a key called {name!r} is authorized already; revoke it first with: "
                    f"achilles keys revoke {name}"
                )
        longer = [*present, entry]
        if len(_encode(longer)) > LIST_MAX:  # nobody could read it again
            raise ConfigError(
                f"no further key fits into {_path(base)} ({LIST_MAX} bytes); take some back with: achilles keys revoke NAME"
            )
        _write(base, longer)
    return entry


def _path(base: Path) -> Path:
    return private_directory(private_directory(base) / "keys") / "authorized.json"


def _read(base: Path) -> list[Entry]:
    path = _path(base)
    try:
        found = msgspec.json.decode(read_private(path, LIST_MAX), type=_File).keys
    except FileNotFoundError:
        return []
    except (msgspec.DecodeError, ValueError):
        raise KeyFileError(f"{path} is damaged; put it right, or remove it") from None
    for entry in found:
        if entry.role not in ROLES or not is_key(entry.public):
            raise KeyFileError(f"{path} is damaged: {entry.name!r} has no key or no role")
    return found


def _write(base: Path, found: list[Entry]) -> None:
    write_private(_path(base), _encode(found), replace=True)


def _encode(found: list[Entry]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(_File(found)))


@contextlib.contextmanager
def _locked(base: Path) -> Iterator[None]:
    """One change at a time."""
    path = private_directory(private_directory(base) / "keys") / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
