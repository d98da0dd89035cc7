"""``achilles status``, ``achilles drain`` and ``achilles shutdown``."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import click

from achilles.cli.settings import ANY_ARGUMENT, Context, count
from achilles.config import home

if TYPE_CHECKING:
    from achilles.net.control import Answer, Question
    from achilles.net.keys import Join

END_SECONDS = 10.0  # for a broker to end after a shutdown
LOOK_INTERVAL = 0.02


def _task_name(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, int]:
    """A client's name (or none) and the number of its task: ``17``, or ``CLIENT/17``."""
    client, _, number = (value or "0").rpartition("/")
    if not re.fullmatch("[0-9]{1,18}", number) or (value is not None and not int(number)):
        raise click.BadParameter(
            f"{value!r} is no task: that is its number, as repr(future) shows it, or CLIENT/NUMBER"
        )
    return client, int(number)


@click.command()
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
@click.option(
    "--explain",
    "task",
    callback=_task_name,
    metavar="TASK",
    help="Say where a task is, and what it waits for: its number, as its future shows it, or CLIENT/NUMBER.",
)
@click.pass_obj
def status(context: Context, output: str, task: tuple[str, int]) -> None:
    """Show workers, slots and tasks of the broker, and what nobody may run."""
    client, number = task
    address, values = _status(context, client, number)
    if number:
        _explain(address, values["waiting"], number, output)
        return
    if output == "json":
        click.echo(json.dumps({"address": address, **values}, indent=2))
        return
    click.echo(
        f"broker {address}: {count(values['workers'], 'worker')}, {count(values['slots'], 'slot')} | tasks: "
        f"{values['queued']} queued, {values['running']} running, {values['done']} done, "
        f"{values['failed']} failed, {values['reassigned']} reassigned, {values['late']} late"
    )
    rows = values["workers_by_name"]
    if rows:
        head = f"{'state':<9} {'slots':>5} {'running':>8} {'done':>10} {'silent':>8}"
        click.echo(f"{'worker':<32} {head}")
    for name, row in rows.items():
        click.echo(
            f"{name:<32} {row['state']:<9} {row['slots']:>5} {row['running']:>8} {row['done']:>10} "
            f"{row['silent_for']:>6.1f} s"
        )
    for waiting in values["waiting"]:
        tasks = "1 task waits" if waiting["count"] == 1 else f"{waiting['count']} tasks wait"
        click.echo(f"client {waiting['client']}: {tasks}: {_with_advice(waiting, address)}")


def _explain(address: str, rows: list[dict[str, Any]], number: int, output: str) -> None:
    """Print what the broker says of the tasks of that number.

    Raises:
        AchillesError: it knows none.
    """
    from achilles.errors import AchillesError

    if not rows:
        raise AchillesError(
            f"the broker at {address} has no task {number} that is not done: it has its outcome, was cancelled, or "
            "waits in its client until the broker takes more"
        )
    if output == "json":
        click.echo(json.dumps({"address": address, "waiting": rows}, indent=2))
        return
    for row in rows:
        click.echo(f"task {number} of {row['client']}: {_with_advice(row, address)}")


def _with_advice(row: dict[str, Any], address: str) -> str:
    """Why a task waits, and what to do about it."""
    from achilles.core import protocol as p
    from achilles.core.waiting import advice

    helps = advice(p.Waiting(**row), address)
    return f"{row['reason']}; {helps}" if helps else str(row["reason"])


@click.command(context_settings=ANY_ARGUMENT)
@click.argument("worker")
@click.pass_obj
def drain(context: Context, worker: str) -> None:
    """Have WORKER, as `achilles status` calls it, finish what it runs and end;
    what waits there goes elsewhere.
    """
    from achilles.core import protocol as p
    from achilles.errors import AchillesError

    join, answer = _ask(context, p.DrainWorker(worker))
    assert isinstance(answer, p.WorkerDrains)
    if not answer.count:
        _, values = _status(context)
        present = ", ".join(values["workers_by_name"]) or "none"
        raise AchillesError(
            f"the broker at {join.address} has no worker {worker!r}; its workers: {present}"
        )
    click.echo(f"worker {worker} takes no more tasks, and ends when it has finished those it runs")


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def shutdown(context: Context, yes: bool) -> None:
    """End the broker and its workers; tasks without a result fail."""
    from achilles.core import protocol as p
    from achilles.net.control import Asking
    from achilles.net.peer import dialer_to

    if not yes:
        address, values = _status(context)
        open_tasks = values["queued"] + values["running"]
        loss = f"; {count(open_tasks, 'task')} without a result will fail" if open_tasks else ""
        workers = count(values["workers"], "worker")
        click.confirm(f"End the broker at {address} and its {workers}{loss}?", abort=True)
    join = context.join("admin")
    is_own = not context.settings["join"]
    with Asking(dialer_to(join)) as asking:
        asking.ask(p.Shutdown(), context.settings["client.connect_timeout"])
        has_ended = not is_own and asking.sees_the_end(END_SECONDS)
    if has_ended or (is_own and _has_ended(join)):
        click.echo(f"the broker at {join.address} has ended, and its workers with it")
    else:
        click.echo(f"the broker at {join.address} and its workers are ending")


def _status(context: Context, client: str = "", task: int = 0) -> tuple[str, dict[str, Any]]:
    """The broker's address, and its status as plain values; with a ``task``, where it is."""
    from achilles.core import protocol as p
    from achilles.core.status import status_dict

    join, answer = _ask(context, p.StatusRequest(task, client))
    assert isinstance(answer, p.Status)
    return join.address, status_dict(answer)


def _ask(context: Context, question: Question) -> tuple[Join, Answer]:
    from achilles.net.control import request
    from achilles.net.peer import dialer_to

    join = context.join("admin")
    timeout = context.settings["client.connect_timeout"]
    return join, request(dialer_to(join), question, timeout=timeout)


def _has_ended(join: Join) -> bool:
    """Wait for this user's broker to take its join file away,
    which it does later than its sockets; whether it did in time.
    """
    from achilles.errors import AchillesError
    from achilles.net.keys import find_join

    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        try:
            now = find_join(home(), "admin", None)
        except AchillesError:
            return True
        if now.pid != join.pid:
            return True  # there is a new one already
        time.sleep(LOOK_INTERVAL)
    return False
