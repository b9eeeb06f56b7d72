"""The command line. A command's module is imported when that command runs, not before."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

COMMANDS = {
    "export": "volcast.export.cli",
    "classifier": "volcast.export.classifier_cli",
    "build": "volcast.export.build_cli",
    "sample": "volcast.runtime.cli",
    "verify": "volcast.export.cli",
    "evaluate": "volcast.export.evaluate_cli",
    "info": "volcast.runtime.cli",
    "likelihood": "volcast.runtime.likelihood_cli",
    "anomaly": "volcast.runtime.anomaly_cli",
    "heal": "volcast.runtime.heal_cli",
    "generate": "volcast.runtime.generate_cli",
    "pack": "volcast.export.pack_cli",
    "quantize": "volcast.export.quantize_cli",
    "bench": "volcast.benchmarks.cli",
    "serve": "volcast.triton_repo.cli",
    "request": "volcast.runtime.client_cli",
}


class _Lazy(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        single.command(cmd_name)(getattr(import_module(COMMANDS[cmd_name]), cmd_name))
        return typer.main.get_command(single)


def _version(shown: bool) -> None:
    if shown:
        from volcast import __version__

        typer.echo(f"volcast {__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Cast volumes from trained MONAI generative models."""


def _command(arguments: Sequence[str] | None) -> str:
    return next((word for word in (sys.argv[1:] if arguments is None else arguments) if word in COMMANDS), "")


def app(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Exit codes: 0 done, 1 a failed verification, 2 bad input (one line on stderr), 130 interrupted, 141 nobody reads on.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    group = typer.Typer(
        cls=_Lazy, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    group.callback()(_options)
    try:
        typer.main.get_command(group)(args=arguments, prog_name="volcast")
    except SystemExit as exit:
        return 141 if isinstance(exit.__context__, BrokenPipeError) else int(exit.code or 0)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        extras = {
            "export": "export",
            "build": "export,kernels",
            "verify": "export",
            "evaluate": "bench",
            "bench": "bench",
            "pack": "export",
            "quantize": "export",
            "serve": "serve",
            "request": "client",
        }
        extra = extras.get(_command(arguments))
        if extra is None:
            raise
        print(f"volcast: this command needs {error.name}: pip install 'volcast[{extra}]'", file=sys.stderr)
        return 2
    except (ValueError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"volcast: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(app())
