"""A program's own modules run on workers that were started elsewhere,
with nothing installed or copied there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster

BOUND = 60.0


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Local modules and packages that import each other in all the usual ways."""
    files = {
        "settings.py": "FACTOR = 3\n",
        "shapes/__init__.py": "from .square import Square\nfrom . import errors\n",
        "shapes/square.py": """
            from dataclasses import dataclass

            from settings import FACTOR

            from .errors import BadSide


            @dataclass
            class Square:
                side: int

                def scaled(self):
                    if self.side < 0:
                        raise BadSide(f"side {self.side}")
                    return Square(self.side * FACTOR)
            """,
        "shapes/errors.py": "class BadSide(ValueError):\n    pass\n",
        "plain/deep/work.py": """
            def scale(square):
                import inspect
                from shapes.square import Square
                assert type(square) is Square
                assert "def scale(square)" in inspect.getsource(scale)
                return square.scaled()


            def need():
                import no_such_module_anywhere
            """,
        "main.py": """
            import sys
            import traceback

            import shapes
            from achilles import DistributedExecutor
            from plain.deep.work import need, scale
            from shapes import Square

            with DistributedExecutor(address=sys.argv[1]) as executor:
                print([square.side for square in executor.map(scale, map(Square, range(4)))])
                try:
                    executor.submit(scale, Square(-1)).result()
                except shapes.errors.BadSide as error:
                    print("caught", error, 'raise BadSide(f"side' in str(error.__cause__))
                try:
                    executor.submit(need).result()
                except ModuleNotFoundError as error:
                    print(error)
            """,
    }
    place = tmp_path / "program"
    for name, text in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return place


def run(place: Path, cluster: Cluster, script: str = "main.py") -> list[str]:
    done = subprocess.run(
        [sys.executable, script, cluster.address],
        cwd=place,
        env={**os.environ, "ACHILLES_HOME": cluster.home, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_local_modules_and_packages(program: Path, cluster: Cluster) -> None:
    assert run(program, cluster) == [
        "[0, 3, 6, 9]",
        "caught side -1 True",
        "No module named 'no_such_module_anywhere'",
    ]


def test_an_edit_is_seen(program: Path, cluster: Cluster) -> None:
    assert run(program, cluster)[0] == "[0, 3, 6, 9]"
    (program / "settings.py").write_text("FACTOR = 5\n")
    assert run(program, cluster)[0] == "[0, 5, 10, 15]"


def test_a_module_that_only_the_client_has_installed(program: Path, cluster: Cluster) -> None:
    """What a task's arguments need and nobody can serve: the error says what is missing,
    and where.
    """
    (program / "ext.py").write_text(
        textwrap.dedent("""
            import importlib.abc, importlib.util, sys
            from achilles import DistributedExecutor

            class InMemory(importlib.abc.InspectLoader):
                def find_spec(self, name, path=None, target=None):
                    return importlib.util.spec_from_loader(name, self) if name == "made_in_memory" else None

                def get_source(self, name):
                    return "class Thing: pass"

            sys.meta_path.append(InMemory())
            import made_in_memory as made

            with DistributedExecutor(address=sys.argv[1]) as executor:
                try:
                    executor.submit(print, made.Thing()).result()
                except ModuleNotFoundError as error:
                    print(error)
            """)
    )
    (line,) = run(program, cluster, "ext.py")
    assert "module 'made_in_memory' is not installed on worker " in line
    assert sys.executable in line


def test_programs_with_modules_of_one_name(tmp_path: Path) -> None:
    """Two clients' modules of the same name do not mix, on one runner, in turns."""
    script = textwrap.dedent("""
        import sys
        from achilles import DistributedExecutor
        import helper

        with DistributedExecutor(address=sys.argv[1]) as executor:
            for line in sys.stdin:
                print(executor.submit(helper.who).result(), flush=True)
        """)
    with Cluster(workers=1, slots=1) as cluster:
        environ = {**os.environ, "ACHILLES_HOME": cluster.home}
        programs = []
        for name in ("one", "two"):
            place = tmp_path / name
            place.mkdir()
            (place / "main.py").write_text(script)
            (place / "helper.py").write_text(
                f"import state\n\ndef who():\n    state.calls += 1\n    return '{name}', state.calls\n"
            )
            (place / "state.py").write_text("calls = 0\n")
            programs.append(
                subprocess.Popen(
                    [sys.executable, "main.py", cluster.address],
                    cwd=place,
                    env=environ,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        said = []
        for turn in range(6):
            program = programs[turn % 2]
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write("\n")
            program.stdin.flush()
            said.append(program.stdout.readline().strip())
        for program in programs:
            program.communicate(timeout=BOUND)
    assert said == [f"('{name}', {calls})" for calls in (1, 2, 3) for name in ("one", "two")]
