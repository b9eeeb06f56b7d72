"""Options of a command that mean nothing beside what else was given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def leave_out(context: typer.Context, why: str, parameters: Iterable[str]) -> None:
    """ValueError: some of the `parameters` (names of the command's function) are given, be it with their defaults.

    It tells the options by name, and `why` they mean nothing.
    """
    wanted = set(parameters)
    named = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in wanted and source is not None and source.name == "COMMANDLINE":
            option = parameter.param_type_name == "option"
            spelt = max(parameter.opts, key=len) if option else str(parameter.name).upper()
            off = getattr(parameter, "secondary_opts", ())
            named.append(off[0] if off and context.params[parameter.name] is False else spelt)
    if named:
        them = "it" if len(named) == 1 else "them"
        raise ValueError(f"[{context.info_name}] {', '.join(named)}: {why}; leave {them} out")
