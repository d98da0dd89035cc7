"""Keys and join files: how peers of one user find a broker, and what they show it.

    $ACHILLES_HOME/keys/ROLE.key      a CURVE key pair a role, made on first start (0700 directory, 0600 files)
    $ACHILLES_HOME/keys/code.key      the code key, which clients and workers seal with (`runtime.seal`)
    $ACHILLES_HOME/keys/authorized.json   the keys of others (`net.authorized`)
    $ACHILLES_HOME/run/ROLE.join      where the running broker listens, and the keys to meet it; removed when it ends
    $ACHILLES_HOME/run/*.ipc          its sockets for peers on this host
    $ACHILLES_HOME/run/broker.lock    held while it runs

The broker neither reads nor makes the code key: it is in no file that the broker writes, and the
join files that are sent to other hosts get it from ``achilles keys export``. Nothing loose is used
(`net.private`), and secrets appear in no text, log or ``repr``.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import zmq
from zmq.utils import z85

from achilles.errors import BrokerUnreachableError, ConfigError, KeyFileError
from achilles.net.endpoint import IPC_PATH_MAX, CurveKeys, Endpoint, hostname, parse_endpoint
from achilles.net.private import check_directory, private_directory, read_private, write_private

ROLES = ("client", "worker", "admin")
CODE_SIZE = 32


class KeyPair(NamedTuple):
    """A CURVE key pair, Z85 text."""

    public: bytes
    secret: bytes

    @property
    def fingerprint(self) -> str:
        """A short name for the public key."""
        return hashlib.sha256(z85.decode(self.public)).hexdigest()[:16]

    @property
    def raw_public(self) -> bytes:
        """The public key's 32 bytes, as a ZAP handler sees it."""
        return bytes(z85.decode(self.public))

    def __repr__(self) -> str:
        return f"<KeyPair {self.fingerprint}>"


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    public: str
    secret: str


class _CodeFile(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    secret: str


class Join(msgspec.Struct, forbid_unknown_fields=True):
    """What a peer of one role needs to find and meet a broker.
    Users type ``address``, never ``worker_address``.
    """

    role: str
    address: str
    worker_address: str
    ipc: str
    worker_ipc: str
    host: str
    pid: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]  # 0: on another host
    public: str
    secret: str
    broker_public: str
    far_address: str = ""  # the same from other hosts, for join files that are sent there
    far_worker_address: str = ""
    version: int = 1
    code: str = ""  # the code key, in a join file that was exported; else it is in this user's home

    def __repr__(self) -> str:
        return f"<Join {self.role} of {self.address}>"

    @property
    def keys(self) -> CurveKeys:
        """The keys for TCP."""
        return CurveKeys(self.public.encode(), self.secret.encode(), self.broker_public.encode())

    def for_others(self, pair: KeyPair, code: bytes = b"") -> Join:
        """The same for another host, with a key of its own, and the code key."""
        return msgspec.structs.replace(
            self,
            address=self.far_address or self.address,
            worker_address=self.far_worker_address or self.worker_address,
            ipc="",
            worker_ipc="",
            pid=0,
            public=pair.public.decode(),
            secret=pair.secret.decode(),
            code=z85.encode(code).decode(),
        )

    def encode(self) -> bytes:
        """As in a join file."""
        return msgspec.json.encode(self)

    def running_pid(self) -> int:
        """The broker's process, if it is known and runs on this host; else 0."""
        return self.pid if self.host == hostname() and _is_running(self.pid) else 0

    def endpoint(self) -> Endpoint:
        """Where to connect: ipc where broker and peer share a host, else TCP."""
        is_worker = self.role == "worker"
        ipc = self.worker_ipc if is_worker else self.ipc
        if ipc and self.host == hostname():
            endpoint = parse_endpoint(ipc)
            if os.path.exists(endpoint.path):
                return endpoint
        return parse_endpoint(self.worker_address if is_worker else self.address)


# --- Directories ----------------------------------------------------------------------------------


def run_directory(base: Path) -> Path:
    """Where a broker's sockets are: ``run`` in its home,
    or a short private one where that path is none for a socket.

    Raises:
        KeyFileError: it is not private, or cannot be made.
    """
    run = private_directory(private_directory(base) / "run")
    if len(os.fsencode(run / "workers.ipc")) <= IPC_PATH_MAX and str(run).isprintable():
        return run
    digest = hashlib.sha256(os.fsencode(run)).hexdigest()[:16]
    short = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return private_directory(short / f"achilles-{os.getuid()}-{digest}")


# --- Keys -----------------------------------------------------------------------------------------


def key_pair(base: Path, role: str) -> KeyPair:
    """The key pair of ``role`` ("broker", or one of `ROLES`), made if there is none.

    Raises:
        KeyFileError: the file is loose or damaged, or cannot be written.
    """
    path = private_directory(private_directory(base) / "keys") / f"{role}.key"
    try:
        data = read_private(path)
    except FileNotFoundError:
        write_private(path, _encode_pair(role, make_pair()), replace=False)
        data = read_private(path)
    try:
        file = msgspec.json.decode(data, type=_KeyFile)
    except (msgspec.DecodeError, ValueError):
        raise KeyFileError(f"{path} is damaged; remove it, and a new key is made") from None
    if file.role != role or not _are_pair(file.public, file.secret):
        raise KeyFileError(
            f"{path} does not hold the key pair of the role {role}; remove it, and a new key is made"
        )
    return KeyPair(file.public.encode(), file.secret.encode())


def new_key_pair(base: Path, role: str) -> KeyPair:
    """Replace the key pair of ``role`` by a new one.

    Raises:
        KeyFileError: it cannot be written.
    """
    path = private_directory(private_directory(base) / "keys") / f"{role}.key"
    pair = make_pair()
    write_private(path, _encode_pair(role, pair), replace=True)
    return pair


def code_key(base: Path) -> bytes:
    """The code key of this user's clients and workers, made if there is none. Not for brokers.

    Raises:
        KeyFileError: the file is loose or damaged, or cannot be written.
    """
    path = _code_path(base)
    try:
        data = read_private(path)
    except FileNotFoundError:
        write_private(path, _encode_code(secrets.token_bytes(CODE_SIZE)), replace=False)
        data = read_private(path)
    try:
        file = msgspec.json.decode(data, type=_CodeFile)
    except (msgspec.DecodeError, ValueError):
        file = _CodeFile("", "")
    if file.role != "code" or not is_key(file.secret):
        raise KeyFileError(
            f"{path} is damaged; copy it from another client or worker of the cluster, or make a new one with: "
            "achilles keys rotate code"
        )
    return bytes(z85.decode(file.secret.encode()))


def new_code_key(base: Path) -> bytes:
    """Replace the code key by a new one.

    Raises:
        KeyFileError: it cannot be written.
    """
    write_private(_code_path(base), _encode_code(secrets.token_bytes(CODE_SIZE)), replace=True)
    return code_key(base)


def code_of(join: Join, base: Path) -> bytes:
    """The code key for a client or worker with that join file: the file's own, else this user's.

    Raises:
        KeyFileError: the join file is another host's, and neither it nor ``base`` has one.
    """
    if join.code:
        return bytes(z85.decode(join.code.encode()))
    if not join.pid and not _code_path(base).exists():
        raise KeyFileError(
            f"the join file for {join.address} was exported without the code key, and there is none in {base}; copy "
            "keys/code.key from a client or worker of the cluster to there"
        )
    return code_key(base)


def _code_path(base: Path) -> Path:
    return private_directory(private_directory(base) / "keys") / "code.key"


def _encode_code(code: bytes) -> bytes:
    return msgspec.json.encode(_CodeFile("code", z85.encode(code).decode()))


def make_pair() -> KeyPair:
    """A new pair."""
    return KeyPair(*zmq.curve_keypair())


def _encode_pair(role: str, pair: KeyPair) -> bytes:
    return msgspec.json.encode(_KeyFile(role, pair.public.decode(), pair.secret.decode()))


def _are_pair(public: str, secret: str) -> bool:
    try:
        return zmq.curve_public(secret.encode()) == public.encode()
    except (zmq.ZMQError, ValueError):
        return False


def is_key(text: str) -> bool:
    """Whether it is a key in Z85."""
    try:
        return len(text) == 40 and len(z85.decode(text.encode())) == 32
    except (KeyError, ValueError, struct.error):
        return False


# --- Join files -----------------------------------------------------------------------------------


def join_path(base: Path, role: str) -> Path:
    """Where the running broker's join file for ``role`` is."""
    return base / "run" / f"{role}.join"


def write_joins(
    base: Path,
    *,
    address: str,
    worker_address: str,
    ipc: str,
    worker_ipc: str,
    far_address: str = "",
    far_worker_address: str = "",
    pid: int | None = None,
) -> None:
    """Write the running broker's join files; ``pid`` is the process that users know,
    by default this one.

    Raises:
        KeyFileError: a directory is loose, or cannot be written to.
    """
    private_directory(private_directory(base) / "run")
    broker_public = key_pair(base, "broker").public.decode()
    for role in ROLES:
        pair = key_pair(base, role)
        join = Join(
            role,
            address,
            worker_address,
            ipc,
            worker_ipc,
            hostname(),
            pid or os.getpid(),
            pair.public.decode(),
            pair.secret.decode(),
            broker_public,
            far_address,
            far_worker_address,
        )
        path, data = join_path(base, role), join.encode()
        if not _has(path, data):  # as a broker's next process finds them, and the disk may be full
            write_private(path, data, replace=True)


def _has(path: Path, data: bytes) -> bool:
    """Whether the file is there, in order, and holds just that."""
    try:
        return read_private(path) == data
    except (FileNotFoundError, KeyFileError):
        return False


def remove_joins(base: Path) -> None:
    """Remove the join files; only whoever holds the broker's lock may."""
    for role in ROLES:
        join_path(base, role).unlink(missing_ok=True)


def read_join(path: Path) -> Join:
    """The join file at ``path``.

    Raises:
        FileNotFoundError: there is none.
        KeyFileError: it is loose or damaged.
    """
    for directory in (path.parent.parent, path.parent):
        check_directory(directory)
    join = parse_join(read_private(path), str(path), "start the broker again")
    if not join.pid:
        raise KeyFileError(f"{path} is damaged (it is another host's); start the broker again")
    return join


def parse_join(data: bytes, name: str, remedy: str) -> Join:
    """The join file of that content; ``name`` and ``remedy`` are for the error.

    Raises:
        KeyFileError: it is damaged.
    """
    try:
        join = msgspec.json.decode(data, type=Join)
        if join.version != 1:
            raise KeyFileError(f"{name} is of another version of achilles")
        for address in (join.address, join.worker_address):
            parse_endpoint(address)
    except KeyFileError:
        raise
    except (msgspec.DecodeError, ValueError, ConfigError) as error:
        raise KeyFileError(f"{name} is damaged ({error}); {remedy}") from None
    is_sound = _are_pair(join.public, join.secret) and is_key(join.broker_public)
    is_sound = is_sound and (not join.code or is_key(join.code))
    if join.role not in ROLES or not is_sound:
        raise KeyFileError(f"{name} is damaged (a key or role); {remedy}")
    return join


def given_join(file: str, role: str, address: str | None) -> Join:
    """The join file that the user named, for a peer of that role.

    Raises:
        ConfigError: ``address`` is no endpoint, or another one than the file's.
        KeyFileError: there is none, it is loose or damaged, or for another role.
    """
    path = Path(file).expanduser()
    remedy = f"export it again on the broker's host with: achilles keys export {role}"
    try:
        join = parse_join(read_private(path), str(path), remedy)
    except FileNotFoundError:
        raise KeyFileError(f"there is no join file {path}; {remedy}") from None
    check_join(join, str(path), role, address)
    beside = path.absolute().parent.parent
    if join.pid and not join.code and (beside / "keys" / "code.key").exists():
        return msgspec.structs.replace(join, code=z85.encode(code_key(beside)).decode())
    return join


def check_join(join: Join, name: str, role: str, address: str | None) -> Join:
    """The join file, if it is for a peer of that role at that address.

    Raises:
        ConfigError: it is not.
    """
    if join.role != role:
        raise KeyFileError(
            f"{name} is for {_a(join.role)}, and this is {_a(role)}; "
            f"export one on the broker's host with: achilles keys export {role}"
        )
    if address not in (None, "auto") and not _same_place(str(address), join.address):
        raise ConfigError(f"{name} is for the broker at {join.address}, not for {address}")
    return join


def _a(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def find_join(base: Path, role: str, address: str | None) -> Join:
    """The join file for the broker at ``address``; None and "auto" are this user's running broker.

    Raises:
        ConfigError: ``address`` is no endpoint.
        BrokerUnreachableError: no broker of this user runs, or none there.
        KeyFileError: the join file is loose or damaged.
    """
    wanted = None if address in (None, "auto") else str(parse_endpoint(str(address)))
    try:
        join = read_join(join_path(base, role))
    except FileNotFoundError:
        if wanted is None:
            text = f"no achilles broker of yours is running ({base} has no join file)"
        else:
            text = f"no achilles broker of yours is running at {wanted} ({base} has no key for it)"
        raise BrokerUnreachableError(
            f"{text}; start one with: achilles broker; or, for another host's, name the join file that "
            f"`achilles keys export {role}` wrote there, with the setting join (ACHILLES_JOIN)"
        ) from None
    places = [place for place in (join.address, join.far_address) if place]
    if wanted is not None and not (
        wanted == join.ipc or any(_same_place(wanted, place) for place in places)
    ):
        raise BrokerUnreachableError(
            f"your running broker is at {join.address}, not at {wanted}; there is no key for another one in {base}; "
            "name its join file with the setting join (ACHILLES_JOIN)"
        )
    if join.host == hostname() and not join.running_pid():
        raise BrokerUnreachableError(
            f"the achilles broker at {join.address} (pid {join.pid}) has ended without removing its join file; "
            "start one with: achilles broker"
        )
    return join


def _same_place(one: str, other: str) -> bool:
    a, b = parse_endpoint(one), parse_endpoint(other)
    return a == b or (a.port == b.port and {a.host, b.host} == {"localhost", "127.0.0.1"})


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
