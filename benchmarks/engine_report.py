"""The engines' results as a JSON line, and as tables for the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from volcast.runtime.spec import ArtifactSpec

from .race import Result

COLUMNS = ("step", "decode", "volume", "time over the first's (min..max of the rounds)", "cold start", "peak memory",
           "off the first")  # fmt: skip


def as_record(
    results: Sequence[Result], *, spec: ArtifactSpec, environment: Mapping[str, Any], steps: int, repeats: int
) -> dict[str, Any]:
    """Everything for JSON."""
    return {
        "benchmark": "engines",
        "model": {"name": spec.name, "latent_shape": list(spec.latent_shape)},
        "settings": {"steps": steps, "repeats": repeats, "batch": 1, "scheduler": spec.scheduler.scheduler},
        "environment": dict(environment),
        "engines": [result.as_dict(steps) for result in results],
    }


def as_markdown(record: Mapping[str, Any]) -> str:
    """A table of medians, and under it who could not run and why; `step` is the loop's time divided by the steps."""
    where, settings = record["environment"], record["settings"]
    what = f"{record['model']['name']}, {settings['steps']} {settings['scheduler']} steps, batch 1"
    on = f"{where['cpu']}, {where['threads']} threads, load {where['load']} before"
    lines = [
        f"{what}, {settings['repeats']} rounds; {on}:",
        "",
        f"| engine | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    ran = [engine for engine in record["engines"] if engine["reason"] is None]
    lines += [f"| {_name(engine)} | {' | '.join(_cells(engine))} |" for engine in ran]
    missing: dict[str, list[str]] = {}
    for engine in record["engines"]:
        if engine["reason"] is not None:
            missing.setdefault(engine["reason"].removeprefix("Unavailable: "), []).append(_name(engine))
    lines += [""] if missing else []
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in missing.items()]
    return "\n".join(lines)


def _cells(engine: Mapping[str, Any]) -> list[str]:
    ratio, device = engine["over_volcast"], engine["device_mib"]["maximum"]
    error = engine["relative_l2"]
    return [
        f"{engine['step_ms']['median']:.3g} ms",
        f"{engine['decode_ms']['median']:.3g} ms",
        f"{engine['volume_s']['median']:.3g} s",
        "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['minimum']:.2f}..{ratio['maximum']:.2f})",
        f"{engine['cold_s']:.3g} s",
        f"{engine['peak_mib']['maximum']:.0f} MiB" + (f", {device:.0f} on the device" if device else ""),
        "-" if error is None else f"{error:.1e}",
    ]


def _name(engine: Mapping[str, Any]) -> str:
    return str(engine["name"]).removeprefix("volcast ")
