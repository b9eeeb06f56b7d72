"""Who takes part in a race, and in what: a selection resolved against the artifact, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from volcast.runtime.artifact import read_artifact
from volcast.runtime.conditions import resolve
from volcast.runtime.default_artifact import BUNDLE, default_artifact
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.noise import request_noise
from volcast.runtime.sizes import latent_sizes
from volcast.runtime.spec import ArtifactSpec

from .contestant import Task
from .plain_cache import plain_folder
from .race import REFERENCE
from .worker import Entry

INSTALL = "pip install 'volcast[bench]'"
SEED = 0
_HERE = "volcast.benchmarks"
PLAIN = Entry(
    name="plain ONNX Runtime", module=f"{_HERE}.contestants_onnxruntime", function="OnnxRuntimeContestant"
)
EXPORT = Entry(name="plain ONNX export", module=f"{_HERE}.contestants_onnxruntime", function="export_plain")
PEERS = {
    "monai": Entry(name=REFERENCE, module=f"{_HERE}.contestants_monai", function="MonaiContestant"),
    "compile": Entry(
        name="MONAI torch.compile",
        module=f"{_HERE}.contestants_monai",
        function="MonaiContestant",
        options=(("compiled", True),),
    ),
    "onnxruntime": PLAIN,
}


@final
@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the command line asked for; None: the bundled model, its bundle, one thread a physical core."""

    artifact: Path | None
    bundle: Path | None
    peers: tuple[str, ...]
    engines: tuple[str, ...]
    threads: int | None


@final
@dataclass(frozen=True, kw_only=True)
class Ready:
    """A race that can start. `exports` are what must be made first, by the contestant that needs it."""

    entries: tuple[Entry, ...]
    exports: Mapping[str, Entry]
    task: Task
    model: Mapping[str, object]


def parse_peers(text: str) -> tuple[str, ...]:
    """Names of `PEERS` with commas between, or `none` (ValueError: unknown, repeated, or not installed)."""
    names = () if text == "none" else tuple(text.split(","))
    if not set(names) <= PEERS.keys() or len(set(names)) != len(names):
        raise ValueError(f"[bench] peers={text}: need some of {', '.join(PEERS)}, each once, or none")
    missing = [name for name in ("torch", "monai") if names and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"[bench] peers={text}: {' and '.join(missing)} not installed; {INSTALL}, or --peers none"
        )
    return names


def prepare(selection: Selection, steps: int) -> Ready:
    """Resolve a selection.

    Raises:
        ValueError: steps out of range, a bad artifact, engine or number of threads, a model that MONAI's inferer or
            DDIM cannot sample, an artifact without its bundle.
    """
    engines = [open_engine(name, selection.threads) for name in selection.engines]
    if len({engine.name for engine in engines}) != len(engines):
        raise ValueError(
            f"[bench] engine={','.join(selection.engines)}: one engine stands twice; name it once"
        )
    bundle = BUNDLE if selection.artifact is None and selection.bundle is None else selection.bundle
    if selection.peers and bundle is None:
        raise ValueError(
            "[bench] peers need the bundle that ARTIFACT was exported from; give --against, or --peers none"
        )
    folder = default_artifact() if selection.artifact is None else selection.artifact
    spec = read_artifact(folder)
    _check_model(spec, selection.peers, steps)
    conditions = default_conditions(spec)
    weights = {key: value for key, value in spec.provenance.items() if key.endswith("_sha256")}
    plain = plain_folder(weights) if "onnxruntime" in selection.peers else None
    task = Task(
        artifact=folder,
        bundle=bundle,
        plain=plain,
        steps=steps,
        threads=engines[0].threads,
        seed=SEED,
        noise=request_noise(SEED, range(1), 0, spec.latent_shape),
        conditions=conditions,
        weights=weights,
    )
    ours = tuple(
        Entry(
            name=f"volcast {engine.name}",
            module=f"{_HERE}.contestants_volcast",
            function="VolcastContestant",
            options=(("engine", engine.name),),
        )
        for engine in engines
    )
    return Ready(
        entries=(*(PEERS[name] for name in selection.peers), *ours),
        exports={PLAIN.name: EXPORT} if plain is not None and not plain.is_dir() else {},
        task=task,
        model={
            "name": spec.name,
            "precision": str(spec.precision),
            "latent_shape": list(spec.latent_shape),
            **weights,
        },
    )


def _check_model(spec: ArtifactSpec, peers: tuple[str, ...], steps: int) -> None:
    last = spec.scheduler.noise_schedule.num_train_timesteps
    if not 1 <= steps <= last:
        raise ValueError(f"[bench] steps={steps}: need 1..{last}")
    if spec.scheduler.prediction_type == "flow":
        raise ValueError(
            f"[bench] {spec.name} is a rectified flow; DDIM, which bench compares, cannot sample it"
        )
    others = [condition.name for condition in spec.conditions if condition.name != "context"]
    if peers and others:
        raise ValueError(
            f"[bench] {spec.name} takes {', '.join(others)}, MONAI's inferer passes only context on; use --peers none"
        )


def default_conditions(spec: ArtifactSpec) -> dict[str, NDArray[np.generic]]:
    """The defaults of conditions that are described by fields, zeros for the others, without a batch axis."""
    _, sizes = latent_sizes(spec, None)
    given = {
        condition.name: np.zeros(
            [sizes.get(s, 1) if isinstance(s, str) else s for s in condition.shape], condition.dtype
        )
        for condition in spec.conditions
        if not condition.fields
    }
    return dict(resolve(spec, given, sizes).values)
