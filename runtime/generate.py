"""Many volumes by many workers: who makes what, and what happens when a worker dies.

One process gives the tasks, publishes what comes back (`dataset.py` says why that is safe) and replaces dead workers;
where the workers run is a `Crew`'s affair. What a volume is depends on (seed, sample) and the dataset's settings alone,
so that it does not matter who makes it, when, or how often it was begun.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import volcast

from .artifact import MANIFEST, read_manifest
from .atomic import sha256
from .condition_text import parse_conditions
from .dataset import Dataset
from .dataset_conditions import DatasetConditions, listed, parse_dataset_conditions
from .dataset_manifest import SHARD, Entry, volume_name
from .engine_auto import INSTALL, check_engine, open_engine
from .generate_worker import Crew, Died, Failed, Finished, Made, Ready, Recipe, Task
from .job import make_job
from .request import SAMPLES_OF_A_SEED, make_request
from .reuse import refuse_reuse
from .spec import ArtifactSpec, Manifest
from .token_choice import Choice
from .token_spec import TokenSpec

DEPTH = 2
"""Tasks that a worker holds: it goes on while its answer is published."""
FALLS = 5
"""After so many deaths without a volume in between a slot is given up."""
_LONGEST_PAUSE_S = 30.0
_OF_TOKENS = ("temperature", "top_k", "top_p")


@final
@dataclass(frozen=True, kw_only=True)
class Generation:
    """A dataset to make, checked: `count` volumes of `artifact`.

    Attributes:
        engine: never "auto": what a run resolves must be what the next one does.
        threads: of each worker. Part of the settings, since an engine may round otherwise with more.
        settings: of a diffusion model `Settings`, `steps` and `scheduler` resolved; of a token model all of
            `ChoiceSettings`; of a one-pass model none.
        negative: conditions of guidance's other branch, of every volume.
    """

    artifact: Path
    artifact_sha256: str
    name: str
    count: int
    seed: int
    engine: str
    threads: int
    settings: Any
    conditions: DatasetConditions
    negative: Mapping[str, Any]

    def described(self) -> dict[str, Any]:
        """The content of `dataset.json`: all that a volume's bytes depend on, and not how many there are."""
        return {
            "format": 1,
            "volcast": volcast.__version__,
            "artifact": {"name": self.name, "manifest_sha256": self.artifact_sha256},
            "seed": self.seed,
            **self.settings,
            "conditions": self.conditions.listed(),
            **({"negative": listed(self.negative)} if self.negative else {}),
            "engine": self.engine,
            "threads": self.threads,
            "shard": SHARD,
        }

    def recipe(self, parts: Path) -> Recipe:
        return Recipe(
            artifact=self.artifact, artifact_sha256=self.artifact_sha256, engine=self.engine, threads=self.threads,
            seed=self.seed, settings=self.settings, constant=self.conditions.constant, negative=self.negative,
            parts=parts,
        )  # fmt: skip

    def entry(self, made: Made) -> Entry:
        sample = made.task.sample
        return Entry(
            index=sample, seed=self.seed, sample=sample, file=volume_name(sample), sha256=made.sha256,
            bytes=made.bytes, shape=made.shape, conditions=listed({**self.conditions.constant, **made.task.own}),
        )  # fmt: skip


def prepare(
    artifact: Path,
    count: int,
    *,
    seed: int = 0,
    engine: str = "auto",
    threads: int = 1,
    here: bool = True,
    condition: Iterable[str] = (),
    negative: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Generation:
    """Check everything that can be checked without running a program.

    Args:
        count: 0..1,000,000.
        here: whether the engine is this machine's; otherwise `engine` is not "auto" and need not be installed.
        condition: texts as `parse_dataset_conditions` reads them.
        negative: texts as `parse_conditions` reads them, the same for every volume.
        settings: `steps`, `scheduler`, `guidance`, of a token model `temperature`, `top_k`, `top_p`; None: left out.

    Raises:
        ValueError: anything out of range, in one line.
    """
    if not 0 <= count <= SAMPLES_OF_A_SEED:
        raise ValueError(f"[generate] num={count}: need 0..{SAMPLES_OF_A_SEED}")
    spec = read_manifest(artifact)
    check_engine(spec, engine)
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    conditions = parse_dataset_conditions(spec, condition)
    other = parse_conditions(spec, negative)
    if isinstance(spec, ArtifactSpec):
        of_tokens = [name for name in _OF_TOKENS if name in given]
        if of_tokens:
            raise ValueError(
                f"[generate] {', '.join(of_tokens)}: for token models (a VQVAE with a transformer); leave it out"
            )
        wanted: Any = {"steps": None, "scheduler": None, "guidance": None, **given}
        request = make_request(spec, seed, wanted)
        refuse_reuse(request, "generate", "call Model.sample_many, which keeps features")
        conditions.check(spec, seed, count)
        if count:
            make_job(spec, request, 1, 1, {**conditions.constant, **conditions.own(seed, 0)}, None, other)
        wanted["steps"] = request.sampler.steps
        wanted["scheduler"] = request.sampler.scheduler or spec.scheduler.scheduler
    else:
        wanted = _own_settings(spec, given | ({"negative": other} if other else {}))
        conditions.check(spec, seed, count)
    # An engine for a GPU is opened by the workers alone: the GPU may be elsewhere.
    name = open_engine(engine, threads).name if here and engine in ("auto", *INSTALL) else engine
    return Generation(
        artifact=artifact.resolve(), artifact_sha256=sha256(artifact / MANIFEST), name=spec.name, count=count,
        seed=seed, engine=name, threads=threads, settings=wanted, conditions=conditions, negative=other,
    )  # fmt: skip


def _own_settings(spec: Manifest, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a token model, of a one-pass model none. ValueError: others, or out of range."""
    known = _OF_TOKENS if isinstance(spec, TokenSpec) else ()
    unknown = [name for name in given if name not in known]
    if unknown:
        kind = "samples tokens" if known else "makes an image in one pass"
        raise ValueError(
            f"[generate] {', '.join(unknown)}: {spec.name} {kind}; known: {', '.join(known) or 'none'}"
        )
    if not isinstance(spec, TokenSpec):
        return {}
    choice = Choice(**given)
    choice.check(spec.num_codes)
    return asdict(choice)


def run(
    generation: Generation, dataset: Dataset, crew: Crew, workers: int, on_volume: Callable[[], object]
) -> int:
    """Publish what `dataset` lacks of `generation`; how many workers died. `on_volume` is called after each volume.

    Raises:
        ValueError: a worker ran into what every worker would (no room, values that are not finite), or no worker lasts.
            All that was published stays.
    """
    queue = deque(sample for sample in range(generation.count) if sample not in dataset.done)
    left = len(queue)
    held: dict[int, deque[int]] = {}  # by the slots of workers that are ready
    falls: Counter[int] = Counter()
    slots = min(workers, left)
    hire_at = dict.fromkeys(range(slots), 0.0)
    lost = 0
    while left:
        now = time.monotonic()
        for slot in [slot for slot, when in hire_at.items() if when <= now]:
            del hire_at[slot]
            crew.hire(slot)
        pause = max(0.0, min(hire_at.values()) - now) if hire_at else None
        for event in crew.events(pause):
            match event:
                case Ready():
                    held[event.slot] = deque()
                case Finished():
                    held[event.slot].popleft()
                    falls[event.slot] = 0
                    dataset.publish(generation.entry(event.made), event.made.part)
                    left -= 1
                    on_volume()
                case Failed():
                    raise ValueError(event.reason)
                case Died():
                    lost += 1
                    falls[event.slot] += 1
                    # To the end: if a sample is what kills workers, all others are made first.
                    queue.extend(held.pop(event.slot, ()))
                    fallen = falls[event.slot]
                    if fallen < FALLS:
                        hire_at[event.slot] = time.monotonic() + min(_LONGEST_PAUSE_S, 0.25 * 2**fallen)
                    elif all(falls[slot] >= FALLS for slot in range(slots)):
                        raise ValueError(
                            f"[generate] no worker lasts, {left} volumes are not made (the last one: {event.reason}); "
                            "look for the cause (memory?) and run the same command again"
                        )
        for slot, samples in held.items():
            # Near the end a second task would wait here while another worker has none.
            while queue and len(samples) < (DEPTH if len(queue) >= slots else 1):
                samples.append(queue.popleft())
                own = generation.conditions.own(generation.seed, samples[-1])
                crew.give(slot, Task(sample=samples[-1], own=own))
    return lost
