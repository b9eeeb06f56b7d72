"""Conditions of a dataset's samples: one for all, drawn for each, or a row of a table for each."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .atomic import sha256
from .condition_text import parse_conditions
from .conditions import resolve
from .sizes import default_sizes
from .spec import Manifest
from .volume import Volume

TABLES = (".csv", ".jsonl")
_LISTED = 64
"""An array of more numbers than this stands in the manifest by its sha256."""


@final
@dataclass(frozen=True, kw_only=True)
class DatasetConditions:
    """Attributes:
    constant: values that all samples share.
    uniform: (a, b) of each field that is drawn.
    rows: values of each sample; None without a table.
    table_sha256: of the table's file.
    """

    constant: Mapping[str, float | NDArray[np.generic] | Volume]
    uniform: Mapping[str, tuple[float, float]]
    rows: Sequence[Mapping[str, Any]] | None = None
    table_sha256: str | None = None

    def own(self, seed: int, sample: int) -> dict[str, Any]:
        """What sample number `sample` does not share; it depends on (seed, sample) and the names alone."""
        drawn = {name: draw(seed, sample, name, *ends) for name, ends in self.uniform.items()}
        return drawn if self.rows is None else {**self.rows[sample], **drawn}

    def listed(self) -> dict[str, Any]:
        """For the dataset's description."""
        table = {} if self.table_sha256 is None else {"table_sha256": self.table_sha256}
        ranges = {name: {"uniform": list(ends)} for name, ends in self.uniform.items()}
        return {**listed(self.constant), **ranges, **table}

    def check(self, spec: Manifest, seed: int, count: int) -> None:
        """Resolve every sample's conditions against the artifact (ValueError names the sample)."""
        if self.rows is not None and len(self.rows) < count:
            raise ValueError(
                f"[generate] the table of conditions has {len(self.rows)} rows for {count} samples: give one a sample"
            )
        sizes = default_sizes(spec)
        shared = not self.uniform and self.rows is None
        for sample in range(min(count, 1) if shared else count):
            try:
                resolve(spec, {**self.constant, **self.own(seed, sample)}, sizes)
            except ValueError as error:
                raise error if shared else ValueError(f"{error} (sample {sample})") from error


def parse_dataset_conditions(spec: Manifest, texts: Iterable[str]) -> DatasetConditions:
    """Read `name=value` as `volcast sample` does, `name=uniform:a,b`, or the path of a `.csv` or `.jsonl` table.

    Raises:
        ValueError: an unreadable table, a name given twice, a range that is none.
    """
    constant: list[str] = []
    uniform: dict[str, tuple[float, float]] = {}
    table: Path | None = None
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals and text.endswith(TABLES):
            if table is not None:
                raise ValueError(f"[condition] {table} and {text}: give one table")
            table = Path(text)
        elif value.startswith("uniform:"):
            if name in uniform:
                raise ValueError(f"[condition] {name} is given twice; give it once")
            uniform[name] = _range(spec, name, value)
        else:
            constant.append(text)
    shared = parse_conditions(spec, constant)
    rows = None if table is None else _read_table(table)
    columns = {name for row in rows or () for name in row}
    twice = sorted((uniform.keys() & shared.keys()) | (columns & (uniform.keys() | shared.keys())))
    if twice:
        raise ValueError(f"[condition] {twice[0]} is given twice; give it once")
    digest = None if table is None else sha256(table)
    return DatasetConditions(constant=shared, uniform=uniform, rows=rows, table_sha256=digest)


def draw(seed: int, sample: int, name: str, low: float, high: float) -> float:
    """low + (high - low) u, with u in [0, 1) from the first 53 bits of Philox 4x64-10 (arXiv: Salmon et al. 2011).

    Its key is (seed, sample), its counter the sha256 of the field's name: no draw depends on another, and none shares
    a stream with the sampler's noise, which is Philox 4x32-10.
    """
    counter = int.from_bytes(hashlib.sha256(name.encode()).digest(), "little")
    bits = np.random.Philox(key=seed | sample << 64, counter=counter).random_raw()
    return low + (high - low) * ((int(bits) >> 11) * 2.0**-53)


def listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions for JSON: numbers, lists, and of large arrays and volumes shape and sha256, of volumes their affine too."""
    return {name: _listed(value) for name, value in values.items()}


def _listed(value: Any) -> Any:
    array = np.asarray(value)
    # Where a volume lies, its samples lie.
    place = {"affine": value.affine.tolist()} if isinstance(value, Volume) else {}
    if array.size <= _LISTED and not place:
        return array.tolist()
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()
    return {"shape": list(array.shape), "sha256": digest} | place


def _range(spec: Manifest, name: str, value: str) -> tuple[float, float]:
    fields = [field.name for condition in spec.conditions for field in condition.fields]
    if name not in fields:
        raise ValueError(
            f"[condition] {name}={value}: only a number is drawn; known: {', '.join(fields) or 'none'}"
        )
    try:
        low, high = (float(part) for part in value.removeprefix("uniform:").split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"[condition] {name}={value}: write uniform:a,b with a <= b")
    return low, high


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".csv":
                return _read_csv(path, csv.DictReader(stream, strict=True, skipinitialspace=True))
            return [_row(path, number, line) for number, line in enumerate(stream, 1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"[condition] {path}: cannot read it ({reason})") from error


def _read_csv(path: Path, reader: csv.DictReader[str]) -> list[dict[str, Any]]:
    rows = []
    for cells in reader:
        row: dict[str, Any] = {}
        for name, text in cells.items():
            # DictReader files what a long row has too much under None, and gives None for what a short one lacks.
            if name is None or text is None:
                raise ValueError(
                    f"[condition] {path} line {reader.line_num}: not as many cells as the header"
                )
            if text.strip():
                try:
                    row[name.strip()] = float(text)
                except ValueError as error:
                    raise ValueError(
                        f"[condition] {path} line {reader.line_num}: {name}={text!r} is not a number"
                    ) from error
        rows.append(row)
    return rows


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[condition] {path} line {number} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f'[condition] {path} line {number}: need an object, as {{"name": 0.5}}')  # noqa: TRY004  (a file's, not a caller's)
    return row
