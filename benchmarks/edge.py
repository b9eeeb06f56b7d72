"""What does volcast take on a device that has a pack and nothing else? Import, load, memory, disk.

    python -m volcast.benchmarks.edge PACK [--repeats 5] [-o results/edge.jsonl]

Installs the pack (a folder that `volcast pack` wrote) in an empty environment, and starts processes there that import
volcast and load the artifact: every digest is checked, no program is opened yet.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Annotated, Any

import typer

from volcast.runtime.pack import ARTIFACT, REQUIREMENTS, WHEELS, read_pack

from .bench import environment, summarize
from .report import append

CODE = """
import sys, time
began = time.perf_counter()
import volcast
load = volcast.load
imported = time.perf_counter()
model = load(sys.argv[1])
loaded = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
import json
print(json.dumps({"import_s": imported - began, "load_s": loaded - imported, "engine": model.engine.name,
                  "resident_mib": int(status["VmRSS"].split()[0]) / 1024, "modules": len(sys.modules)}))
"""


def install(pack: Path, folder: Path) -> Path:
    """An environment in `folder` with the pack's packages alone; its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    wheels = [str(path) for path in (pack / WHEELS).glob("*.whl")]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*command, "-r", str(pack / REQUIREMENTS), *wheels], check=True, stdout=sys.stderr)
    return python


def start(python: Path, artifact: Path) -> dict[str, Any]:
    """One process that imports volcast and loads the artifact."""
    done = subprocess.run([python, "-I", "-c", CODE, artifact], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(pack: Path, repeats: int) -> dict[str, Any]:
    """Statistics of `repeats` starts, in seconds and MiB."""
    manifest = read_pack(pack)
    with tempfile.TemporaryDirectory(prefix="volcast-edge-") as place:
        python = install(pack, Path(place) / "env")
        starts = [start(python, pack / ARTIFACT) for _ in range(repeats)]
        installed = sum(path.stat().st_size for path in (Path(place) / "env").rglob("*") if path.is_file())
    both = [one["import_s"] + one["load_s"] for one in starts]
    return {
        "benchmark": "edge",
        "pack": {"name": manifest.name, "target": manifest.target, "versions": manifest.versions},
        "engine": starts[0]["engine"],
        "modules": starts[0]["modules"],
        "import_s": summarize([one["import_s"] for one in starts]).as_dict(),
        "load_s": summarize([one["load_s"] for one in starts]).as_dict(),
        "import_and_load_s": summarize(both).as_dict(),
        "resident_mib": summarize([one["resident_mib"] for one in starts]).as_dict(),
        "installed_mib": installed / 2**20,
        "pack_mib": sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()) / 2**20,
    }


def as_text(record: dict[str, Any]) -> str:
    """The figures in a line."""
    both, where = record["import_and_load_s"], record["environment"]
    return (
        f"import and load {both['median']:.2f} s ({both['minimum']:.2f}..{both['maximum']:.2f}; import alone "
        f"{record['import_s']['median']:.2f} s), {record['resident_mib']['maximum']:.0f} MiB resident, "
        f"{record['modules']} modules, {record['installed_mib']:.0f} MiB installed, pack {record['pack_mib']:.0f} MiB; "
        f"{where['cpu']}, load {where['load']} before"
    )


def main(
    pack: Annotated[Path, typer.Argument(help="Folder that `volcast pack` wrote for this machine.")],
    repeats: Annotated[int, typer.Option(help="Processes to start.")] = 5,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append the result to this file, as a JSON line.")
    ] = None,
) -> None:
    """Measure a pack in an environment of its own."""
    where = environment(1)
    record = {**measure(pack, repeats), "environment": where}
    print(as_text(record))
    if output is not None:
        append(output, record)


if __name__ == "__main__":
    typer.run(main)
