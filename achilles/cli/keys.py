"""``achilles keys``: who may meet the broker."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from achilles.cli.settings import ANY_ARGUMENT, Context, count, escape
from achilles.config import home

if TYPE_CHECKING:
    from achilles.net.authorized import Entry

ROLES = ("client", "worker", "admin")


@click.group()
def keys() -> None:
    """Say who may meet your broker: other machines and other people,
    each with a key of their own.
    """


@keys.command("list")
def list_() -> None:
    """List the keys that may meet the broker."""
    from achilles.net.authorized import entries

    click.echo(f"{'role':<7} {'fingerprint':<17} {'since':<11} name")
    for entry in entries(home()):
        since = entry.added or "-"
        click.echo(f"{entry.role:<7} {entry.fingerprint:<17} {since:<11} {escape(entry.name)}")


@keys.command()
@click.argument("role", type=click.Choice(ROLES))
@click.option("--name", metavar="NAME", help="What the new key is called; by default ROLE-NUMBER.")
@click.option(
    "--without-code",
    is_flag=True,
    help="Leave the code key out: it goes another way, past this host.",
)
@click.pass_obj
def export(context: Context, role: str, name: str | None, without_code: bool) -> None:
    """Print a join file with a new key for another machine or person.

    It holds a secret. Send it through something that you trust, for example:

        achilles keys export worker --name node7 | ssh node7 achilles worker --join -
    """
    if sys.stdout.isatty():
        raise click.UsageError(
            "this prints a secret, and stdout is a terminal; send it on with a pipe, or into a file "
            "that only you can read, with: (umask 077; achilles keys export ROLE > FILE)"
        )
    from achilles.net import authorized
    from achilles.net.keys import code_key, find_join

    base = home()
    join = find_join(base, role, context.address())
    code = b"" if role == "admin" or without_code else code_key(base)
    called = name or _next_name(role, authorized.entries(base))
    made = authorized.export(base, role, called)
    _reload(context)
    click.echo(join.for_others(made.pair, code).encode())
    click.echo(
        f"achilles keys: made the key {made.entry.fingerprint} ({role} {escape(called)}) for "
        f"{join.far_address or join.address}; take it back with: achilles keys revoke {called}",
        err=True,
    )
    if "//127." in (join.far_address or join.address):
        click.echo(
            "achilles keys: this broker listens on loopback alone, where no other host can reach it; "
            "start it with: achilles broker --bind tcp://ADDRESS:5555",
            err=True,
        )


@keys.command(context_settings=ANY_ARGUMENT)
@click.argument("role", type=click.Choice(ROLES))
@click.argument("public")
@click.option("--name", metavar="NAME", required=True, help="What the key is called.")
@click.pass_obj
def add(context: Context, role: str, public: str, name: str) -> None:
    """Authorize the PUBLIC key (Z85, 40 characters) of somebody who keeps the secret one."""
    from achilles.net.authorized import add as authorize

    entry = authorize(home(), role, public, name)
    _reload(context)
    click.echo(f"{role} {escape(name)} ({entry.fingerprint}) may meet the broker")


@keys.command(context_settings=ANY_ARGUMENT)
@click.argument("which", metavar="NAME|FINGERPRINT")
@click.pass_obj
def revoke(context: Context, which: str) -> None:
    """Take keys off the list, and cut the sessions that use them; their work goes to others."""
    from achilles.net.authorized import revoke as take_off

    gone = take_off(home(), which)
    cut = _reload(context)
    for entry in gone:
        click.echo(f"revoked {entry.role} {escape(entry.name)} ({entry.fingerprint})")
    if cut is not None:
        click.echo(f"the running broker cut {count(cut, 'session')}")


@keys.command()
@click.argument("role", type=click.Choice(["broker", "code", *ROLES]))
@click.pass_obj
def rotate(context: Context, role: str) -> None:
    """Replace your own key of a role by a new one; or the code key,
    which clients and workers seal with.
    """
    if role == "code":
        from achilles.net.keys import new_code_key

        new_code_key(home())
        click.echo(
            "the code key is a new one; start your clients and workers again, and export anew what you have sent to others"
        )
        return
    from achilles.net.authorized import rotate as replace

    pair = replace(home(), role)
    click.echo(f"your {role} key is now {pair.fingerprint}")
    if role == "broker":
        click.echo(
            "it holds from the broker's next start on; join files that you have sent elsewhere must be "
            "exported anew then"
        )
        return
    cut = _reload(context)
    if cut is not None:
        click.echo(
            f"the running broker cut {count(cut, 'session')}; start again what used the old key"
        )


def _next_name(role: str, present: list[Entry]) -> str:
    names = {entry.name for entry in present}
    return next(name for n in range(1, 1 << 30) if (name := f"{role}-{n}") not in names)


def _reload(context: Context) -> int | None:
    """Let the running broker read the keys anew; how many sessions it has cut,
    None if none runs.
    """
    from achilles.core import protocol as p
    from achilles.errors import BrokerUnreachableError, ConfigError
    from achilles.net.control import request
    from achilles.net.keys import find_join
    from achilles.net.peer import dialer_to

    try:
        join = find_join(home(), "admin", None)
    except BrokerUnreachableError:
        return None
    timeout = context.settings["client.connect_timeout"]
    answer = request(dialer_to(join), p.ReloadKeys(), timeout=timeout)
    assert isinstance(answer, p.KeysReloaded)
    if answer.error:
        raise ConfigError(f"the running broker still uses the keys that it had: {answer.error}")
    return answer.cut
