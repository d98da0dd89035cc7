"""One contestant in one round, in a process of its own:
``python -m benchmarks.contestant NAME OUTPUT --scale JSON``.

Each line of OUTPUT is one JSON object: what a workload found, as soon as it did, so that what was
found before a failure counts. Stdout is not used, because peers print there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks import systems
from benchmarks.work import noop

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Have processes that this one's children leave behind stay its descendants,
    where they are counted and ended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(name: str, scale: dict[str, Any], wanted: list[str], tell: Callable[..., None]) -> None:
    """Start the contestant, run the workloads, and tell of each."""
    with ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="b-", ignore_cleanup_errors=True)
        )
        os.chdir(directory)
        start = time.perf_counter()
        ending, system = systems.started(name, directory)
        stack.enter_context(ending)
        if system.gather([system.submit(noop, 1)]) != [1]:
            raise RuntimeError("the first result is wrong")
        startup = time.perf_counter() - start
        tell("startup", {"startup_s": startup}, {}, version=systems.version(name))

        from benchmarks import workloads

        bench = workloads.Measurement(system, workloads.Scale(**scale))
        for workload in wanted:
            found = (workloads.EACH_ROUND | workloads.ONCE)[workload]
            begun = time.perf_counter()
            bench.notes = {}
            known = dict(bench.figures)
            try:
                found(bench)
            except Exception as error:
                bench.figures = known  # a workload that failed halfway has no figures
                traceback.print_exc()
                bench.notes = {workload: f"failed: {type(error).__name__}: {error}"[:200]}
            new = {key: value for key, value in bench.figures.items() if key not in known}
            tell(workload, new, bench.notes, seconds=time.perf_counter() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contestant")
    parser.add_argument("name", choices=sorted(systems.CONTESTANTS))
    parser.add_argument("output")
    parser.add_argument("--scale", type=json.loads, default={})
    parser.add_argument("--workloads", default="")
    options = parser.parse_args()
    adopt_orphans()
    with open(options.output, "a", encoding="utf-8") as output:

        def tell(
            workload: str, figures: dict[str, float], notes: dict[str, str], **more: Any
        ) -> None:
            line = {"workload": workload, "figures": figures, "notes": notes, **more}
            output.write(json.dumps(line) + "\n")
            output.flush()

        run(options.name, options.scale, list(filter(None, options.workloads.split(","))), tell)
        tell("end", {}, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
