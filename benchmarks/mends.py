"""Whether the tests of what `docs/security.md` promises would notice that a mend is gone (`mends.toml`).

Each mend is taken out of a copy of the repository, one at a time, and the test that answers for it has to fail. It has
to pass before, with all mends in their places. A mend whose lines are not found once, or whose absence no test notices,
ends the command with 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.common.results import write

ROOT = Path(__file__).parent.parent
COPIED = ("benchmarks", "cluster", "configs", "deployments", "docs", "rapid", "retrieval", "tests")
LONGEST_S, LONGEST_OF_ALL_S = 300.0, 1200.0  # of one test, which may wait for ever without its mend; of all together


class Mend(NamedTuple):
    """``kind`` is mended by ``lines`` in ``file``; with ``without`` in their place ``test`` has to fail."""

    kind: str
    file: str
    lines: str
    without: str
    test: str


def mends() -> list[Mend]:
    with (Path(__file__).with_suffix(".toml")).open("rb") as file:
        return [Mend(**row) for row in tomllib.load(file)["mend"]]


def passes(tests: list[str], root: Path, within_s: float = LONGEST_S) -> bool:
    """Whether the ``tests`` pass in ``root``. What does not end has failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(
            command,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=within_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def is_noticed(mend: Mend, root: Path) -> bool:
    """Whether the mend's test fails without the mend. The file in ``root`` is as before afterwards."""
    file = root / mend.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(mend.lines) != 1:
        raise SystemExit(f"{mend.kind}: its lines stand {whole.count(mend.lines)} times in {mend.file}")
    file.write_text(whole.replace(mend.lines, mend.without), encoding="utf-8")
    try:
        return not passes([mend.test], root)
    finally:
        file.write_text(whole, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mends whose kind has these words")
    options = parser.parse_args()
    chosen = [mend for mend in mends() if options.only in mend.kind]
    rows = []
    with TemporaryDirectory() as folder:
        root = Path(folder) / "rapid"
        for name in COPIED:
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for file in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("*.yaml")):
            shutil.copy(file, root)
        if not passes(sorted({mend.test for mend in chosen}), root, LONGEST_OF_ALL_S):
            raise SystemExit("some tests fail although all mends are in their places")
        for number, mend in enumerate(chosen, 1):
            began = time.monotonic()
            noticed = is_noticed(mend, root)
            rows.append({"kind": mend.kind, "test": mend.test, "noticed": noticed})
            how = "noticed" if noticed else "NOT NOTICED"
            print(f"{number:3} of {len(chosen)}  {how:11}  {time.monotonic() - began:4.0f} s  {mend.kind}", flush=True)
    num_noticed = sum(bool(row["noticed"]) for row in rows)
    if not options.only:
        write("mends", {"mends": len(rows), "noticed_by_a_test": num_noticed, "rows": rows})
    sys.exit(num_noticed < len(rows))


if __name__ == "__main__":
    main()
