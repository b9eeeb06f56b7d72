"""What becomes of the volumes of a command: files, maps of the ensemble, a picture, and a line about each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from .ensemble import Ensemble
from .picture import check_png_path, mosaic, save_picture
from .request import SAMPLES_OF_A_SEED
from .volume import Volume, check_nifti_path


@final
@dataclass(frozen=True, kw_only=True)
class Places:
    """Where volumes and what is made of them go.

    Attributes:
        files: one a volume, sample by sample, of each the weights in turn; `kept`: whether they are written.
        weights: of a guidance sweep, else empty.
        png, mean, variance: None: not asked for.
    """

    files: tuple[Path, ...]
    kept: bool
    weights: tuple[float, ...]
    png: Path | None
    mean: Path | None
    variance: Path | None


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """About a file that was written: in words, and for JSON."""

    text: str
    fields: dict[str, Any]


def make_places(
    output: Path | None, count: int, png: Path | None, mean: Path | None, variance: Path | None,
    weights: Sequence[float], inputs: Sequence[Path] = (),
) -> Places:  # fmt: skip
    """For `count` samples of each weight. `output`: None: sample.nii.gz, or with a map no volumes. `inputs`: files that are
    read, and stay.

    Raises ValueError, before any work: a name or folder that cannot be written, maps of nothing or of several weights.
    """
    maps = [path for path in (mean, variance) if path is not None]
    if variance is not None and count < 2:
        raise ValueError(f"[sample] --variance: of {count} volume; give -n 2 or more")
    if maps and weights:
        raise ValueError("[sample] --mean, --variance: of one guidance weight, not of several; give one")
    if not 1 <= count <= SAMPLES_OF_A_SEED:
        raise ValueError(f"[sample] n={count}: need 1..{SAMPLES_OF_A_SEED}")
    files = output_files(output or Path("sample.nii.gz"), count, png, weights)
    for path in maps:
        output_files(path, 1, None)
    kept = output is not None or not maps
    check_apart([*(files if kept else ()), *maps], inputs)
    return Places(
        files=tuple(files), kept=kept, weights=tuple(weights), png=png, mean=mean,
        variance=variance,
    )  # fmt: skip


def write_volumes(places: Places, volumes: Iterable[Volume], name: str, seed: int) -> list[Line]:
    """Write each volume as it comes and at last what was asked for of all; `name`: the model's."""
    lines, shown, ensemble = [], [], Ensemble()
    each = len(places.weights) or 1
    for number, (path, volume) in enumerate(zip(places.files, volumes, strict=True)):
        if places.png is not None:
            shown.append(volume)
        if places.mean or places.variance:
            ensemble.add(volume)
        if places.kept:
            volume.save(path, f"volcast {name} seed {seed}")
            lines.append(_line(path, volume, seed, number // each))
    for what, target in (("mean", places.mean), ("variance", places.variance)):
        if target is not None:
            made = ensemble.mean() if what == "mean" else ensemble.variance()
            made.save(target, f"volcast {name} seed {seed} {what} of {ensemble.count}")
            fields = {"path": str(target), "seed": seed, what: ensemble.count}
            lines.append(Line(text=f"{target}: {what} of {ensemble.count}", fields=fields))
    if places.png is not None:
        weights = [f" guidance {weight:g}" for weight in places.weights] or [""]
        captions = [f"{name} seed {seed} sample {i}{w}" for i in range(len(shown) // each) for w in weights]
        save_picture(mosaic(shown, captions if len(captions) > 1 else ()), places.png)
    return lines


def output_files(output: Path, count: int, png: Path | None, weights: Sequence[float] = ()) -> list[Path]:
    """One a volume. ValueError: a name or folder that cannot be written."""
    check_nifti_path(output)
    for path in (output, *([] if png is None else [check_png_path(png)])):
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"[sample] {path.parent} is not a folder that can be written to; choose another output"
            )
    suffix = ".nii.gz" if output.name.endswith(".nii.gz") else ".nii"
    numbers = [f"_{i}" for i in range(count)] if count != 1 else [""]
    each = [f"_guidance{weight:g}" for weight in weights] or [""]
    stem = output.name.removesuffix(suffix)
    outputs = [output.with_name(f"{stem}{number}{weight}{suffix}") for number in numbers for weight in each]
    for path in (*outputs, *([] if png is None else [png])):
        if path.is_dir():
            raise ValueError(f"[sample] {path} is a folder; choose another output")
    return outputs


def check_apart(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """ValueError: two of the outputs are one file, or one of them is an input, which it would replace."""
    seen: set[Path] = set()
    for path in outputs:
        place = path.resolve()
        if place in seen:
            raise ValueError(f"[sample] {path} is two of the outputs: give each a name of its own")
        seen.add(place)
    for path in inputs:
        if path.resolve() in seen:
            raise ValueError(f"[sample] {path} is read, and would be replaced: choose another output")


def _line(path: Path, volume: Volume, seed: int, sample: int) -> Line:
    report = volume.report
    assert report is not None
    shape = list(volume.array.shape)
    peak = "process peak" if report.peak_of_process else "peak"
    return Line(
        text=(
            f"{path}: {' x '.join(map(str, shape))}, {report.total_seconds:.2f} s for {report.batch} ({report.steps} "
            f"{report.scheduler} steps {report.loop_seconds:.2f} s, decode {report.decode_seconds:.2f} s, loop overhead "
            f"{report.overhead:.2%}), {peak} {report.peak_bytes / 2**20:.0f} MiB"
        ),
        fields={
            "path": str(path),
            "seed": seed,
            "sample": sample,
            "shape": shape,
            "report": report.as_dict(),
        },
    )
