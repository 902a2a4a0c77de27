"""What the studies share: rows that are written as soon as they are known, so that a second call goes on from them."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_row(file: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a table in a file, which gets a first line with the columns when it is new."""
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        if is_new:
            writer.writeheader()
        writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})


def read_rows(file: Path, key: Sequence[str]) -> dict[tuple[str, ...], dict[str, str]]:
    """All rows by what they have in the columns of ``key``. Where a run was begun anew, its later rows count."""
    rows = csv.DictReader(file.read_text().splitlines()) if file.exists() else ()
    return {tuple(row[name] for name in key): row for row in rows}


class Curves:
    """Measures of runs over time.

    The columns of ``key`` are those that name an arm, then the seed, and then the time.
    """

    def __init__(self, file: Path, key: Sequence[str]) -> None:
        self._rows = read_rows(file, key)

    def seeds(self, *arm: str, last: int) -> list[int]:
        """The seeds of the runs that are complete: those with a row for the last time."""
        return sorted(int(seed) for *of, seed, time in self._rows if (*of, time) == (*arm, str(last)))

    def of(self, *arm: str, times: Sequence[int], measure: str) -> np.ndarray:
        """A measure of all complete runs: seeds, times."""
        rows = [[self._rows[(*arm, str(s), str(t))] for t in times] for s in self.seeds(*arm, last=times[-1])]
        return np.array([[float(row[measure]) for row in run] for run in rows])


def mean_and_std(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """As tables show it; one value has no standard deviation."""
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}"
