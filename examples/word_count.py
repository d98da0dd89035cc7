"""Count the words of all text files below a folder (default: the standard library),
one task a file.
"""

from __future__ import annotations

import argparse
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from achilles import DistributedExecutor

SKIPPED = {"__pycache__", "site-packages", "dist-packages", ".git"}


def text_files(root: Path) -> Iterator[Path]:
    """All regular files without a zero byte near their start."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        for path in (Path(folder, name) for name in sorted(names)):
            if path.is_file():
                with path.open("rb") as file:
                    if b"\0" not in file.read(8192):
                        yield path


def count_words(path: Path) -> Counter[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return Counter(re.findall(r"[^\W\d_]+", text.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--address", help='a broker: "auto" or tcp://host:port; default: no broker')
    arguments = parser.parse_args()
    total: Counter[str] = Counter()
    files = 0
    with DistributedExecutor(address=arguments.address) as executor:
        # With `buffersize`, a tree of any size takes no more memory than that many results.
        for counts in executor.map(count_words, text_files(arguments.root), buffersize=500):
            total.update(counts)
            files += 1
    print(f"{files:,} files, {total.total():,} words")
    for word, count in total.most_common(10):
        print(f"{count:>10,} {word}")


if __name__ == "__main__":
    main()
