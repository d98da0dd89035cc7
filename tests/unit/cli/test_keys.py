from __future__ import annotations

import json
from pathlib import Path

import zmq
from click.testing import CliRunner
from zmq.utils import z85

from achilles.cli import main
from achilles.core import protocol as p
from achilles.net.authorized import add, entries
from achilles.net.control import request
from achilles.net.keys import code_key, key_pair, parse_join
from achilles.net.peer import dialer_to
from tests.brokers import RunningBroker


def invoke(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["keys", *arguments])
    return done.exit_code, done.stdout, done.stderr


def a_key() -> str:
    return zmq.curve_keypair()[0].decode()


def test_the_list_has_no_secrets(achilles_home: Path) -> None:
    add(achilles_home, "worker", a_key(), "node7")
    code, output, _ = invoke("list")
    assert code == 0
    rows = [line.split() for line in output.splitlines()]
    assert [row[0] for row in rows] == ["role", "client", "worker", "admin", "worker"]
    assert rows[-1][-1] == "node7"
    assert key_pair(achilles_home, "client").fingerprint in output
    for role in ("client", "worker", "admin"):
        assert key_pair(achilles_home, role).secret.decode() not in output


def test_export_is_a_join_file_with_a_key_of_its_own(achilles_home: Path) -> None:
    with RunningBroker(achilles_home) as broker:
        code, output, said = invoke("export", "worker", "--name", "node7")
        assert code == 0
        join = json.loads(output)
        assert join["role"] == "worker"
        assert join["worker_address"] == str(broker.addresses.workers)
        assert join["public"] == entries(achilles_home)[-1].public
        assert join["secret"] not in said
        assert "take it back with: achilles keys revoke node7" in said
        assert "listens on loopback alone" in said
        code, _, said = invoke("export", "worker", "--name", "node7")
        assert code == 78
        assert "authorized already" in said
        assert invoke("export", "client")[0] == invoke("export", "client")[0] == 0
        assert [one.name for one in entries(achilles_home)[-2:]] == ["client-1", "client-2"]


def test_without_a_broker_there_is_no_address_to_export(achilles_home: Path) -> None:
    code, output, said = invoke("export", "worker")
    assert (code, output) == (69, "")
    assert "no achilles broker of yours is running" in said
    assert len(entries(achilles_home)) == 3


def test_add_and_revoke(achilles_home: Path) -> None:
    public = a_key()
    code, output, _ = invoke("add", "client", public, "--name", "laptop")
    assert code == 0
    assert output.startswith("client laptop (")
    code, output, _ = invoke("revoke", "laptop")
    assert code == 0
    assert output.startswith("revoked client laptop (")
    code, _, said = invoke("revoke", "laptop")
    assert code == 1
    assert "no key is called 'laptop'" in said
    code, _, said = invoke("revoke", key_pair(achilles_home, "worker").fingerprint)
    assert code == 1
    assert "replace it with: achilles keys rotate worker" in said
    code, _, said = invoke("add", "client", "short", "--name", "laptop")
    assert code == 78
    assert "is not a public key" in said
    assert invoke("add", "king", public, "--name", "laptop")[0] == 2


def test_a_key_whose_secret_never_left_its_owner_is_put_into_a_join_file(
    achilles_home: Path,
) -> None:
    """The way that docs/commands.md describes."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    with RunningBroker(achilles_home):
        exported = json.loads(invoke("export", "admin", "--name", "for-ann")[1])
        assert invoke("add", "admin", public, "--name", "ann")[0] == 0
        assert invoke("revoke", "for-ann")[0] == 0
        join = parse_join(
            json.dumps({**exported, "public": public, "secret": secret}).encode(), "", ""
        )
        status = request(dialer_to(join), p.StatusRequest(), timeout=10)
    assert isinstance(status, p.Status)


def test_a_key_and_a_name_may_begin_with_a_dash(achilles_home: Path) -> None:
    public = "-" + "0" * 39  # one key in 85 begins so
    for name in ("-n", "--laptop"):
        code, output, _ = invoke("add", "client", public, "--name", name)
        assert (code, output.startswith(f"client {name} (")) == (0, True)
        assert entries(achilles_home)[-1].public == public
        code, output, _ = invoke("revoke", name)
        assert (code, output.startswith(f"revoked client {name} (")) == (0, True)
    code, _, said = invoke("add", "client", public, "--nam", "laptop")
    assert code == 2
    assert "--name" in said


def test_rotate(achilles_home: Path) -> None:
    before = key_pair(achilles_home, "client").fingerprint
    code, output, _ = invoke("rotate", "client")
    assert code == 0
    assert before not in output
    assert key_pair(achilles_home, "client").fingerprint in output
    code, output, _ = invoke("rotate", "broker")
    assert code == 0
    assert "exported anew" in output


def test_the_administrators_own_key_is_rotated_over_tcp(achilles_home: Path) -> None:
    """Where the session that asks is one that has the old key."""
    with RunningBroker(achilles_home, ipc=False) as broker:
        for _ in range(2):
            before = broker.join("admin").public
            code, output, said = invoke("rotate", "admin")
            assert (code, said) == (0, "")
            assert "the running broker cut 0 sessions" in output
            assert broker.join("admin").public != before


def test_a_running_broker_that_cannot_read_the_keys_says_so(achilles_home: Path) -> None:
    with RunningBroker(achilles_home):
        (achilles_home / "keys" / "worker.key").chmod(0o644)
        code, _, said = invoke("rotate", "client")
    assert code == 78
    assert "still uses the keys that it had" in said
    assert "chmod 600" in said


def test_the_code_key_goes_with_join_files_unless_it_is_left_out(achilles_home: Path) -> None:
    with RunningBroker(achilles_home):
        for role in ("client", "worker"):
            code, output, said = invoke("export", role)
            assert code == 0
            sent = json.loads(output)["code"]
            assert z85.decode(sent.encode()) == code_key(achilles_home)
            assert sent not in said
        assert json.loads(invoke("export", "admin")[1])["code"] == ""
        assert json.loads(invoke("export", "worker", "--without-code")[1])["code"] == ""


def test_the_code_key_is_rotated(achilles_home: Path) -> None:
    before = code_key(achilles_home)
    code, output, _ = invoke("rotate", "code")
    assert code == 0
    assert "start your clients and workers again" in output
    assert code_key(achilles_home) != before
