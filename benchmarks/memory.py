"""Is the peak where it was foretold? `python -m volcast.benchmarks.memory ARTIFACT [8,12,8 ..]`: JSON lines.

Each row is a process of its own that decodes one random latent: whole, and in slabs under a limit of a share of that.
Bytes are growth of the resident memory since the engine was opened, its libraries counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from volcast.runtime.artifact import read_artifact
from volcast.runtime.autoencoder import decode, decode_plan
from volcast.runtime.engine_auto import open_engine, physical_cores
from volcast.runtime.host_memory import HostMemory
from volcast.runtime.memory import PeakMemory, resident_bytes
from volcast.runtime.programs import Programs

from .bench import environment

ENGINES = ("onnxruntime", "openvino")
SHARES = (0.0, 0.75, 0.5)
"""Of the whole decode's growth that a decode may take; 0: no limit."""


def measure(artifact: Path, engine: str, sizes: tuple[int, ...], share: float) -> dict[str, object]:
    """One decode in this process, which has to be a fresh one."""
    spec, opened = read_artifact(artifact), open_engine(engine)
    if opened.memory is None:
        raise ValueError(f"[bench] engine={engine}: its memory is not foretold")
    axes = {"batch": 1, **{f"d{axis}": size for axis, size in enumerate(sizes)}}
    memory = HostMemory(artifact, spec, opened.memory, None)
    if share:
        limit = memory.base + int(memory.footprint("decode", axes).peak * share)
        memory = HostMemory(artifact, spec, opened.memory, limit)
    programs = Programs(artifact, spec, opened, memory)
    z = np.random.default_rng(0).standard_normal((1, spec.latent_shape[0], *sizes)).astype(np.float32)
    plan = decode_plan(programs, memory, z.shape)
    before, peak, began = resident_bytes(), PeakMemory(), time.perf_counter()
    decode(spec, programs, z)
    seconds, measured = time.perf_counter() - began, peak.bytes() - before
    foretold = plan.peak + opened.memory.library_bytes
    return {
        "artifact": spec.name, "precision": str(spec.precision), "engine": engine, "latent": list(sizes),
        "slabs": plan.slabs, "foretold": foretold, "measured": measured, "ratio": round(foretold / measured, 3), "seconds": round(seconds, 2),
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    if arguments[0] == "one":
        _, artifact, engine, size, share = arguments
        print(json.dumps(measure(Path(artifact), engine, tuple(map(int, size.split(","))), float(share))))
        return
    where = environment(physical_cores())
    for size in arguments[1:] or ["8,12,8"]:
        for engine in ENGINES:
            for share in map(str, SHARES):
                words = [
                    sys.executable,
                    "-m",
                    "volcast.benchmarks.memory",
                    "one",
                    arguments[0],
                    engine,
                    size,
                    share,
                ]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{engine} {size} {share}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                else:
                    print(json.dumps({**json.loads(done.stdout), "environment": where}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
