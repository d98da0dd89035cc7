"""The command ``achilles``: a broker, workers, and what one asks them.

Settings: flags, then ``ACHILLES_*`` in the environment, then ``achilles.toml``, then defaults.
Exit codes: 0; 1 what was asked for is not there; 2 wrong usage or an insecure bind; 69 no broker,
or none that takes this peer; 70 a broker that crashes again and again; 71 no more open files; 78
bad configuration or keys; 129, 130 and 143 (stopped by a signal) only if work was lost.
"""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

import click

import achilles
from achilles.cli import broker, control, keys, settings, worker
from achilles.config import LEVELS
from achilles.errors import AchillesError, BrokerUnreachableError, ConfigError, InsecureBindError

EX_USAGE, EX_UNAVAILABLE, EX_OSERR, EX_CONFIG = 2, 69, 71, 78


class Commands(click.Group):
    """The group of commands; turns our errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InsecureBindError as error:
            _exit(error, EX_USAGE)
        except ConfigError as error:
            _exit(error, EX_CONFIG)
        except BrokerUnreachableError as error:
            _exit(error, EX_UNAVAILABLE)
        except AchillesError as error:
            _exit(error, 1)
        except Exception as error:  # libzmq's errors are of a class of their own
            if getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
                raise
            _exit("too many open files; raise the limit that `ulimit -n` shows", EX_OSERR)


@click.group(cls=Commands)
@click.option("--config", metavar="FILE", help="The achilles.toml to use.")
@click.option("--log-level", type=click.Choice(LEVELS), help="What is logged.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="How log lines look.")
@click.version_option(achilles.__version__, prog_name="achilles")
@click.pass_context
def main(
    ctx: click.Context, config: str | None, log_level: str | None, log_format: str | None
) -> None:
    """A drop-in concurrent.futures Executor, from this laptop to a cluster.

    Start "achilles broker", then "achilles worker" wherever there are cores to lend, and use
    DistributedExecutor(address="auto") in your program.
    """
    ctx.obj = settings.Context(config, log_level, log_format)


def _exit(error: Exception | str, code: int) -> NoReturn:
    settings.say(f"achilles: {settings.escape(str(error))}")
    sys.exit(code)


main.add_command(broker.broker)
main.add_command(worker.worker)
main.add_command(control.status)
main.add_command(control.drain)
main.add_command(control.shutdown)
main.add_command(keys.keys)
main.add_command(settings.init)
main.add_command(settings.config)
