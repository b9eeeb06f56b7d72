"""The commands `export` and `verify`; torch and MONAI are imported when one runs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from tqdm import tqdm

from volcast.runtime.engine_name import EngineName
from volcast.runtime.spec import ArtifactSpec, Manifest, Precision

if TYPE_CHECKING:
    from .verification import Verification

Scheduler = Literal["ddim", "ddpm", "pndm", "dpm-solver++", "rflow"]

BundlePath = Annotated[Path, typer.Argument(help="A MONAI bundle folder, or a config file.")]
Config = Annotated[Path | None, typer.Option(help="Config file, if not configs/inference.json|yaml.")]
Weights = Annotated[
    list[str],
    typer.Option(
        help="unet=FILE, autoencoder=FILE or CONTROLNET=FILE (vqvae=, transformer=), instead of the config's."
    ),
]
Controlnets = Annotated[
    list[str],
    typer.Option("--controlnet", help="Key of a ControlNet in the config, to steer with; repeatable."),
]
Settings = Annotated[list[str], typer.Option("--set", help="KEY=VALUE (JSON) instead of the config's.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def export(
    context: typer.Context,
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artifact.")],
    config: Config = None,
    weights: Weights = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
    controlnets: Controlnets = [],  # noqa: B006
    precision: Annotated[Precision, typer.Option(help="How the weights are stored.")] = Precision.FP32,
    batch: Annotated[str, typer.Option(help="Smallest:largest batch.")] = "1:64",
    reuse: Annotated[
        bool, typer.Option("--reuse", help="With two more programs, for `volcast sample --reuse`.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Replace the artifact in OUTPUT.")] = False,
    as_json: Json = False,
) -> None:
    """Export a trained MONAI bundle to an artifact (ONNX programs and a manifest)."""
    smallest, largest = _batch(batch)
    if output.exists() and not force:
        raise ValueError(f"[export] {output} exists: remove it, choose another name, or pass --force")
    from volcast.runtime.options import leave_out

    from .generator_bundle import has_generator

    if has_generator(bundle, config):
        leave_out(context, "the config's network makes an image in one pass", ("controlnets", "reuse"))
        _export_generator(
            bundle, output, config, weights, settings, precision, (smallest, largest), force, as_json
        )
        return
    from .artifact import export_bundle
    from .transformer_artifact import STAGES, export_transformer
    from .transformer_bundle import has_transformer

    tokens = has_transformer(bundle, config)
    if tokens:
        leave_out(context, "the config is a transformer's, which samples tokens", ("controlnets", "reuse"))
    read: Any = (
        _read_tokens(bundle, config, weights, settings)
        if tokens
        else _read(bundle, config, weights, settings, controlnets)
    )
    stages = ["capture", "schedule", "prepare", "step", *(["step_deep", "step_shallow"] if reuse else [])]
    stages += ["decode", "encode", "slabs", "manifest"]
    if tokens:
        stages = list(STAGES)
    write: Callable[..., Manifest] = (
        export_transformer if tokens else functools.partial(export_bundle, reuse=reuse)
    )
    with tqdm(total=len(stages), desc="export", unit="stage", file=sys.stderr, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update(stages.index(stage) - bar.n)

        spec = write(
            read, output, precision=precision, batch=(smallest, largest), replace=force, progress=progress
        )
    if as_json:
        print(spec.model_dump_json())
    else:
        step = spec.programs["step"]
        print(
            f"{output}: {spec.name}, {precision.value} weights, step {step.nodes} nodes (was {step.nodes_before})"
        )


def _export_generator(
    bundle: Path, output: Path, config: Path | None, weights: list[str], settings: list[str], precision: Precision,
    batch: tuple[int, int], force: bool, as_json: bool,
) -> None:  # fmt: skip
    from .generator_artifact import STAGES, export_generator

    read = _read_generator(bundle, config, weights, settings)
    with tqdm(total=len(STAGES), desc="export", unit="stage", file=sys.stderr, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update(STAGES.index(stage) - bar.n)

        spec = export_generator(
            read, output, precision=precision, batch=batch, replace=force, progress=progress
        )
    nodes = ", ".join(f"{name} {program.nodes} nodes" for name, program in spec.programs.items())
    print(spec.model_dump_json() if as_json else f"{output}: {spec.name}, {precision.value} weights, {nodes}")


def verify(
    context: typer.Context,
    artifact: Annotated[
        Path | None, typer.Argument(help="Folder of an artifact; left out: the bundled hippocampus model.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle that it was exported from; left out: the bundled one.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the artifact.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; left out: the bundle's.")] = None,
    scheduler: Annotated[
        Scheduler | None, typer.Option(help="With --samples. Left out: the model's.")
    ] = None,
    reuse: Annotated[int, typer.Option(help="With --samples: as in `volcast sample`.")] = 1,
    seed: Annotated[int, typer.Option(help="Both samplers start from its noise.")] = 0,
    condition: Annotated[
        list[str], typer.Option("--condition", "-c", help="As in `volcast sample`; repeatable.")
    ] = [],  # noqa: B006
    guidance: Annotated[float | None, typer.Option(help="Weight of classifier-free guidance.")] = None,
    negative: Annotated[
        list[str], typer.Option(help="As in `volcast sample`, with MONAI alone; repeatable.")
    ] = [],  # noqa: B006
    against: Annotated[
        Path | None, typer.Option(help="A float32 artifact in MONAI's place: what int8, fp16 or bf16 costs.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Seeds compared with --against, or with the artifact's own steps; left out: 8 with --against."
        ),
    ] = None,
    reference_steps: Annotated[
        int | None, typer.Option(help="Left out: --steps with --against, else the model's own.")
    ] = None,
    reference_scheduler: Annotated[
        Scheduler | None, typer.Option(help="Left out: --scheduler with --against, else the model's own.")
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="With --samples: folder of real images to compare with, too.")
    ] = None,
    config: Config = None,
    weights: Weights = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
    controlnets: Controlnets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Compare an artifact with MONAI running its bundle: each network and the whole volume. Exit 1 past a budget.

    With --against or --samples: many volumes with a float32 artifact's at the same seeds, or with its own of more steps,
    by MS-SSIM, PSNR, a Fréchet distance and diversity, within the manifest's budget of quality.
    """
    from volcast.runtime.artifact import read_manifest
    from volcast.runtime.condition_text import parse_conditions
    from volcast.runtime.default_artifact import BUNDLE, default_artifact
    from volcast.runtime.generator_spec import GeneratorSpec
    from volcast.runtime.options import leave_out
    from volcast.runtime.token_spec import TokenSpec

    folder = default_artifact() if artifact is None else artifact
    spec = read_manifest(folder)
    given = parse_conditions(spec, condition)
    of_gates = ("scheduler", "reuse", "reference_steps", "reference_scheduler", "real")
    of_steps = ("steps", "guidance", "negative", "controlnets", "against", "samples", *of_gates)
    if isinstance(spec, GeneratorSpec):
        leave_out(context, f"{spec.name} makes an image in one pass", of_steps)
        if bundle is None:
            raise ValueError(f"[verify] BUNDLE: give the bundle that {spec.name} was exported from")
        from .generator_verify import verify_generator

        network = _read_generator(bundle, config, weights, settings)
        _finish(verify_generator(folder, network, engine=engine, seed=seed, condition=given), as_json)
        return
    if isinstance(spec, TokenSpec):
        leave_out(context, f"{spec.name} samples tokens", of_steps)
        from .transformer_verify import verify_tokens

        tokens = _read_tokens(BUNDLE if bundle is None else bundle, config, weights, settings)
        _finish(verify_tokens(folder, tokens, engine=engine, seed=seed, condition=given), as_json)
        return
    gate = against is not None or samples is not None
    if gate:
        of_monai = ("bundle", "config", "weights", "settings", "controlnets", "negative")
        leave_out(context, "for MONAI, not with --against or --samples, which compare artifacts", of_monai)
    else:
        leave_out(context, "with MONAI one volume is compared, without --samples", of_gates)
    with tqdm(desc="verify", unit="call", file=sys.stderr, disable=None, leave=False) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        common: dict[str, Any] = {"engine": engine, "seed": seed, "condition": given}
        common |= {"guidance": guidance, "on_step": on_step}
        if not gate:
            from .verify import verify as compare

            read = _read(BUNDLE if bundle is None else bundle, config, weights, settings, controlnets)
            unwanted = parse_conditions(spec, negative) if negative else None
            found = compare(folder, read, steps=steps, negative=unwanted, **common)
        else:
            from .evaluation_images import read_images
            from .fidelity import SAMPLES, SamplerChoice, fidelity

            assert isinstance(spec, ArtifactSpec)
            choice = SamplerChoice(steps=steps, scheduler=scheduler, reuse=reuse)
            slow = SamplerChoice(steps=reference_steps, scheduler=reference_scheduler)
            if against is None and choice.resolved(spec) == slow.resolved(spec):
                raise ValueError(
                    "[verify] --samples without --against: nothing differs; give --steps, --scheduler or --reuse, or "
                    "--against a float32 artifact"
                )
            if against is not None:
                slow = slow.filled(choice)
            found = fidelity(
                folder, folder if against is None else against, samples=SAMPLES if samples is None else samples,
                sampler=choice, reference_sampler=slow, real=None if real is None else read_images(real), **common,
            )  # fmt: skip
    _finish(found, as_json)


def _finish(found: Verification, as_json: bool) -> None:
    print(json.dumps(found.as_dict()) if as_json else found.as_text())
    if not found.passed:
        raise typer.Exit(1)


def _read(
    bundle: Path, config: Path | None, weights: list[str], settings: list[str], controlnets: list[str]
) -> Any:
    from .bundle import read_bundle

    files, values = weight_files(weights), config_settings(settings)
    return read_bundle(bundle, config=config, weights=files, settings=values, controlnets=controlnets)


def _read_tokens(bundle: Path, config: Path | None, weights: list[str], settings: list[str]) -> Any:
    from .transformer_bundle import read_transformer

    files, values = weight_files(weights), config_settings(settings)
    return read_transformer(bundle, config=config, weights=files, settings=values)


def _read_generator(bundle: Path, config: Path | None, weights: list[str], settings: list[str]) -> Any:
    from .generator_bundle import read_generator

    return read_generator(
        bundle, config=config, weights=weight_files(weights), settings=config_settings(settings)
    )


def weight_files(weights: list[str]) -> dict[str, Path]:
    """`--weights ROLE=FILE` by role (ValueError: no pair)."""
    return {key: Path(value) for key, value in (_pair(text, "--weights") for text in weights)}


def config_settings(settings: list[str]) -> dict[str, Any]:
    """`--set KEY=VALUE` by key (ValueError: no pair)."""
    return {key: _value(value) for key, value in (_pair(text, "--set") for text in settings)}


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"[export] {option} {text!r}: need KEY=VALUE")
    return key, value


def _value(text: str) -> Any:
    """JSON where it parses, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _batch(text: str) -> tuple[int, int]:
    smallest, _, largest = text.partition(":")
    if not smallest.isdecimal() or not (largest or smallest).isdecimal():
        raise ValueError(f"[export] --batch {text!r}: need SMALLEST:LARGEST, such as 1:8")
    return int(smallest), int(largest or smallest)
