"""An environment for each group of contestants,
so that peers whose dependencies contradict each other run in one comparison.

They are made in ``build/bench`` on first use, from the groups ``bench*`` of pyproject.toml, and
made anew when what they are made from changes.
"""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "bench"
INSTALL_SECONDS = 600.0
NEEDS_ACHILLES = {"bench"}


class Environment(NamedTuple):
    """``reason``: why there is none; "" if there is."""

    python: Path
    reason: str


def recipe(project: Mapping[str, Any], group: str) -> str:
    """What the environment of a group is made from; the Python is one part of it."""
    wanted = _requirements(project["dependency-groups"], group)
    own = project["project"]["dependencies"] if group in NEEDS_ACHILLES else []
    return json.dumps([sys.version, wanted, own], indent=1)


def _requirements(groups: Mapping[str, list[Any]], group: str) -> list[str]:
    found: list[str] = []
    for entry in groups[group]:
        included = entry["include-group"] if isinstance(entry, dict) else None
        found += _requirements(groups, included) if included else [entry]
    return found


def prepare(group: str) -> Environment:
    """The environment of a dependency group, made if it is not there or not from the present
    recipe.
    """
    folder = FOLDER / group
    python, stamp = folder / "bin" / "python", folder / "recipe.json"
    if (
        group in NEEDS_ACHILLES
    ):  # pip has done so with the others; it may be that Python writes none by itself
        compileall.compile_dir(ROOT / "achilles", quiet=1)
    wanted = recipe(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8")), group)
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return Environment(python, "")
    print(f"making the environment {group}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    commands = [["--upgrade", "pip>=25.1"], ["--group", group]]
    if group in NEEDS_ACHILLES:
        commands.append(["--editable", "."])
    for arguments in commands:
        reason = _install(python, arguments)
        if reason:
            return Environment(python, reason)
    stamp.write_text(wanted, "utf-8")
    return Environment(python, "")


def _install(python: Path, arguments: list[str]) -> str:
    """Run pip; why it failed, in a line, or ""."""
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip install {arguments[-1]} took longer than {INSTALL_SECONDS:.0f} s"
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or done.stderr.splitlines() or [f"pip exited with {done.returncode}"])[-1]


def main() -> int:
    """Prepare all that are named; ``python -m benchmarks.environments GROUP...``."""
    failed = 0
    for group in sys.argv[1:]:
        environment = prepare(group)
        print(f"{group}: {environment.reason or 'ready'}", flush=True)
        failed += bool(environment.reason)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
