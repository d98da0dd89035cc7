"""Keys of others come, are listed, and go."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import zmq

from achilles.errors import AchillesError, ConfigError, KeyFileError
from achilles.net import authorized
from achilles.net.authorized import OWN, add, entries, export, revoke, rotate, users
from achilles.net.keys import ROLES, key_pair
from achilles.net.private import FILE_MAX


def a_key() -> str:
    return zmq.curve_keypair()[0].decode()


def names(base: Path) -> list[str]:
    return [entry.name for entry in entries(base)]


def test_the_users_own_keys_are_there_from_the_start(achilles_home: Path) -> None:
    own = entries(achilles_home)
    assert [(entry.role, entry.name) for entry in own] == [(role, OWN) for role in ROLES]
    assert own[0].user == f"client/{key_pair(achilles_home, 'client').fingerprint}"


def test_add_and_revoke(achilles_home: Path) -> None:
    public = a_key()
    entry = add(achilles_home, "worker", public, "node7")
    assert names(achilles_home)[3:] == ["node7"]
    assert entry.pair.raw_public in users(achilles_home, ("worker",))
    assert entry.pair.raw_public not in users(achilles_home, ("client", "admin"))
    assert revoke(achilles_home, "node7") == [entry]
    assert names(achilles_home)[3:] == []
    assert revoke(achilles_home, add(achilles_home, "client", public, "me").fingerprint[:8])


def test_export_keeps_no_secret(achilles_home: Path) -> None:
    made = export(achilles_home, "worker", "node7")
    kept = b"".join(path.read_bytes() for path in achilles_home.rglob("*") if path.is_file())
    assert made.pair.public in kept
    assert made.pair.secret not in kept
    assert made.pair.secret.decode() not in repr(made)
    assert (achilles_home / "keys" / "authorized.json").stat().st_mode & 0o777 == 0o600


def test_rotate_replaces_ones_own(achilles_home: Path) -> None:
    before = key_pair(achilles_home, "client")
    after = rotate(achilles_home, "client")
    assert key_pair(achilles_home, "client") == after != before
    assert before.raw_public not in users(achilles_home, ROLES)


@pytest.mark.parametrize(
    ("role", "name", "text"),
    [
        ("chief", "x", "'chief' is not a role; roles are client, worker, admin"),
        ("client", "", "1 to 64 printable characters"),
        ("client", "a\nb", "1 to 64 printable characters"),
        ("client", "x" * 65, "1 to 64 printable characters"),
        ("client", OWN, "1 to 64 printable characters"),
    ],
)
def test_what_cannot_be_added(achilles_home: Path, role: str, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        add(achilles_home, role, a_key(), name)


def test_nothing_is_added_twice(achilles_home: Path) -> None:
    public = a_key()
    add(achilles_home, "client", public, "me")
    with pytest.raises(ConfigError, match="authorized already, as client me"):
        add(achilles_home, "worker", public, "other")
    with pytest.raises(ConfigError, match="revoke it first with: achilles keys revoke me"):
        add(achilles_home, "client", a_key(), "me")
    own = key_pair(achilles_home, "admin").public.decode()
    with pytest.raises(ConfigError, match="authorized already, as admin"):
        add(achilles_home, "client", own, "mine")


def test_the_list_may_be_longer_than_other_files(achilles_home: Path) -> None:
    """A thousand keys, with what a broker and each command do with them."""
    add(achilles_home, "client", a_key(), "me")
    path = achilles_home / "keys" / "authorized.json"
    (first,) = msgspec.json.decode(path.read_bytes())["keys"]
    many = [{**first, "public": a_key(), "name": f"node{number}"} for number in range(1000)]
    path.write_bytes(msgspec.json.encode({"keys": [first, *many]}))
    last = add(achilles_home, "client", a_key(), "last")
    assert path.stat().st_size > 2 * FILE_MAX
    assert len(users(achilles_home, ("client",))) == 1003
    assert revoke(achilles_home, "last") == [last]


def test_what_could_not_be_read_again_is_not_written(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(achilles_home, "client", a_key(), "me")
    path = achilles_home / "keys" / "authorized.json"
    before = path.read_bytes()
    monkeypatch.setattr(authorized, "LIST_MAX", len(before) + 10)
    for one_more in (
        lambda: add(achilles_home, "client", a_key(), "you"),
        lambda: export(achilles_home, "client", "you"),
    ):
        with pytest.raises(ConfigError, match=r"no further key fits into .*authorized\.json"):
            one_more()
    assert path.read_bytes() == before
    assert [one.name for one in revoke(achilles_home, "me")] == ["me"]


@pytest.mark.parametrize("public", ["", "x", "0" * 39, "é" * 40, '"' * 40])
def test_what_is_no_key_is_refused(achilles_home: Path, public: str) -> None:
    with pytest.raises(ConfigError, match="is not a public key"):
        add(achilles_home, "client", public, "me")


def test_whom_one_cannot_revoke(achilles_home: Path) -> None:
    add(achilles_home, "client", a_key(), "me")
    with pytest.raises(AchillesError, match="no key is called 'you'; there are: me"):
        revoke(achilles_home, "you")
    own = key_pair(achilles_home, "worker").fingerprint
    with pytest.raises(
        AchillesError, match="replace it with: achilles keys rotate worker"
    ) as caught:
        revoke(achilles_home, own)
    assert not isinstance(caught.value, ConfigError), "what was asked for is wrong, and no setting"


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"keys": [{}]}', '{"keys": [{"role":"x","public":"y","name":"z","added":""}]}'],
)
def test_a_damaged_list_lets_nobody_in(achilles_home: Path, content: str) -> None:
    entries(achilles_home)
    path = achilles_home / "keys" / "authorized.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="is damaged"):
        users(achilles_home, ROLES)


def test_a_loose_list_lets_nobody_in(achilles_home: Path) -> None:
    add(achilles_home, "client", a_key(), "me")
    path = achilles_home / "keys" / "authorized.json"
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        users(achilles_home, ROLES)
