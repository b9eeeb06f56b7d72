"""How fast are whole networks, and how far from what the device allows?

    python -m volcast.benchmarks.networks [--case TEXT] [--peer TEXT ...] [--work DIR] [-o results/networks.jsonl]

Steps, decodings and volumes of full-size MONAI models in float16. On a GPU each is timed in turns with its peers, after
a comparison of results. Anywhere, the models are exported and built, and operations, launches, FLOPs, bytes, planned
memory and the roofline are counted.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from volcast.export.similarity import ms_ssim, relative_l2
from volcast.runtime.conditions import resolve
from volcast.runtime.device.cost import PEAK_BYTES, PEAK_FLOPS
from volcast.runtime.noise import request_noise
from volcast.runtime.sizes import latent_sizes
from volcast.runtime.spec import ArtifactSpec

from .bench import Statistics, environment, measure, summarize
from .network_cases import CASES, Case, Part, artifact
from .network_counts import Counted
from .network_ours import SEED, VolcastWay, cold_start_s, outside_percent
from .network_peers import PEERS, Call, Given, MonaiWay, Way
from .network_report import as_markdown
from .worker import one_line

STEPS = 50
ROUNDS = 5
ALIKE = 0.03
"""Relative L2 of one call in float16 against float32: 2^-11 a rounding, in some hundred layers one after the other, stays
below; another network is 1 away."""
MS_SSIM = 0.995


def given(spec: ArtifactSpec, part: Part, batch: int) -> Given:
    """Noise and conditions, the same for all: defaults where they are described, else zeros."""
    spatial, sizes = latent_sizes(spec, part.latent)
    conditions = {
        one.name: np.zeros([sizes[s] if isinstance(s, str) else s for s in one.shape], one.dtype)
        for one in spec.conditions if not one.fields
    }  # fmt: skip
    values = resolve(spec, conditions, sizes).values
    x = request_noise(SEED, range(batch), 0, (spec.latent_shape[0], *spatial))
    return Given(x=torch.from_numpy(x), conditions={
        name: torch.from_numpy(np.repeat(value[None], batch, axis=0)) for name, value in values.items()
    })  # fmt: skip


def counted(part: Part, batch: int, counts: Counted) -> dict[str, Any]:
    """What shapes tell of one part. A volume is its steps, and its samples' decodings one by one."""
    if part.part != "volume":
        return counts.program(part.part, part.latent, batch)
    step, decode = counts.program("step", part.latent, batch), counts.program("decode", part.latent, 1)
    kinds = sorted({*step["operations"], *decode["operations"]})
    total = {
        key: STEPS * step[key] + batch * decode[key] for key in ("launches", "flops", "bytes", "roofline_ms")
    }
    return {
        "operations": {
            kind: STEPS * step["operations"].get(kind, 0) + batch * decode["operations"].get(kind, 0)
            for kind in kinds
        },
        **total,
        "weight_bytes": step["weight_bytes"] + decode["weight_bytes"],
        "peak_bytes": step["peak_bytes"] + decode["peak_bytes"],
        "slabs": decode["slabs"],
    }  # fmt: skip


def raced(part: Part, inputs: Given, ways: Sequence[Way], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Every way's milliseconds, peak memory and distance to the first way's result; or the reason why it has none."""
    found: list[dict[str, Any]] = []
    ready: list[tuple[dict[str, Any], Call]] = []
    reference: Tensor | None = None
    for way in ways:
        line: dict[str, Any] = {"name": way.name, "reason": None}
        found.append(line)
        try:
            with _peak() as peak:
                call = _prepared(way, part, inputs)
                result = call()
            line["peak_bytes"] = None if peak() is None else way.weight_bytes + (peak() or 0)
            image = result.float().cpu()
            reference = image if way is ways[0] else reference
            line |= {} if reference is None else _compared(part, image, reference)
        except Exception as error:  # noqa: BLE001  whatever stops a way becomes its line in the table
            line["reason"] = one_line(error)
            continue
        if part.alone:
            line["ms"] = turns([call], rounds)[0].as_dict()
            del call, result
            _tidy()
        else:
            ready.append((line, call))
    for (line, _), statistics in zip(ready, turns([call for _, call in ready], rounds), strict=True):
        line["ms"] = statistics.as_dict()
    return found


def turns(calls: Sequence[Call], rounds: int) -> list[Statistics]:
    """Milliseconds a call, in turns; each turn repeats it for about 0.1 s and waits for the device once."""

    def repeated(call: Call, count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                call()
            _synchronize()

        return run

    first = measure([repeated(call, 1) for call in calls], 1, 1) if calls else []
    counts = [max(1, round(0.1 / seconds[0])) for seconds in first]
    taken = measure([repeated(*pair) for pair in zip(calls, counts, strict=True)], 0, rounds)
    return [
        summarize([1e3 * second / count for second in seconds])
        for seconds, count in zip(taken, counts, strict=True)
    ]


def timed(
    case: Case, folder: Path, spec: ArtifactSpec, peers: Sequence[str], device: str
) -> Iterator[dict[str, Any]]:
    """One mapping for every part and batch of the case, in order."""
    torch.backends.cudnn.benchmark = True
    bundle = case.bundle(True)
    ways: list[Way] = [MonaiWay(name, bundle, torch.device(device)) for name in peers]
    ours = VolcastWay(folder, device)
    ways.append(ours)
    graphs: dict[int, float] = {}
    for part in case.parts:
        for batch in part.batches:
            torch._dynamo.reset()  # or the graphs of one shape serve the next one, with dynamic shapes
            inputs = given(spec, part, batch)
            lines = raced(part, inputs, ways)
            mine = lines[-1]
            extra: dict[str, Any] = {}
            if part.part == "step" and mine["reason"] is None:
                graphs[batch] = mine["ms"]["median"]
            if part.part == "volume" and mine["reason"] is None and batch in graphs:
                loop = ours.reports[0].loop_seconds
                extra["outside_percent"] = outside_percent(loop, STEPS, graphs[batch])
                extra["cold_start_s"] = cold_start_s(folder, inputs, STEPS) if batch == 1 else None
            yield {"gpu": torch.cuda.get_device_name(device), "contestants": lines, **extra}
            _tidy()


def fractions(line: dict[str, Any]) -> dict[str, float] | None:
    """Of the peaks, what volcast reached."""
    mine = next(
        (one for one in (line["timed"] or {}).get("contestants", []) if one["name"] == "volcast"), None
    )
    if mine is None or mine["reason"] is not None:
        return None
    seconds = mine["ms"]["median"] / 1e3
    return {
        "flops": line["flops"] / seconds / PEAK_FLOPS,
        "bytes": line["bytes"] / seconds / PEAK_BYTES,
    }


def rows(case: Case, work: Path, peers: Sequence[str], device: str | None) -> Iterator[dict[str, Any]]:
    """The case's lines; one with a reason where the model cannot be exported or built here."""
    shared = {"case": case.name, "dtype": "float16"}
    try:
        folder = artifact(case, work)
    except (ValueError, MemoryError) as error:
        yield {**shared, "part": None, "reason": one_line(error), "timed": None}
        return
    counts = Counted(folder)
    times = iter(()) if device is None else timed(case, folder, counts.spec, peers, device)
    for part in case.parts:
        for batch in part.batches:
            line = {
                **shared, "part": part.part, "latent": [counts.spec.latent_shape[0], *part.latent], "batch": batch,
                "steps": STEPS if part.part == "volume" else None, "reason": None,
                "reach_ms": part.reach_ms if batch == 1 else None,
                "reach_bytes": part.reach_bytes if batch == 1 else None,
                **counted(part, batch, counts), "timed": next(times, None),
            }  # fmt: skip
            yield {**line, "fraction": fractions(line)}


def _prepared(way: Way, part: Part, inputs: Given) -> Call:
    if part.part == "volume":
        return way.volume(inputs, STEPS)
    return way.step(inputs) if part.part == "step" else way.decode(inputs)


def _compared(part: Part, image: Tensor, reference: Tensor) -> dict[str, float]:
    """Raises ValueError where a result is another one."""
    found, wanted = image.numpy(), reference.numpy()
    distance = relative_l2(found, wanted)
    if part.part != "volume":
        if not distance < ALIKE:
            raise ValueError(f"[bench] differs from the first way by {distance:.3g} (relative L2)")
        return {"relative_l2": distance}
    alike = ms_ssim(found, wanted)
    if not alike > MS_SSIM:
        raise ValueError(f"[bench] MS-SSIM {alike:.4f} against the first way")
    return {"relative_l2": distance, "ms_ssim": alike}


@contextmanager
def _peak() -> Iterator[Callable[[], int | None]]:
    """Bytes that the device allocates beyond what it holds now; None without a GPU."""
    if not torch.cuda.is_available():
        yield lambda: None
        return
    _tidy()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - before


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def main(
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    peer: Annotated[list[str], typer.Option(help="Peers to time; repeatable.")] = list(PEERS),  # noqa: B006
    work: Annotated[
        Path | None, typer.Option(help="Keep the exported models here and take those that are there.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a JSON line a row here.")
    ] = None,
) -> None:
    unknown = [name for name in peer if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"--peer {unknown[0]!r}: need one of {', '.join(PEERS)}")
    device = "cuda" if torch.cuda.is_available() else None
    here = environment(threads=torch.get_num_threads())
    lines: list[dict[str, Any]] = []
    if output is not None:
        output.write_text("")
    chosen = [one for one in CASES if case in one.name]
    for one in tqdm(chosen, desc="networks", unit="case", file=sys.stderr, disable=None):
        began = time.perf_counter()
        with _folder(work) as folder:
            for line in rows(one, folder, peer, device):
                lines.append({**line, "environment": here})
                if output is not None:
                    with output.open("a") as stream:  # a later case that fails takes no result along
                        stream.write(json.dumps(lines[-1]) + "\n")
        tqdm.write(f"{one.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(as_markdown(lines))


if __name__ == "__main__":
    typer.run(main)
