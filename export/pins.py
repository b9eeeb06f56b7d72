"""The packages that run volcast here, pinned for a device."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def pinned(packages: Sequence[str], machine: str) -> dict[str, str]:
    """By name, the version installed here of all that volcast and `packages` need on `machine`; volcast is left out.

    Local parts of versions (2.13.0+cpu) stay out: they tell builds of one machine apart.

    Raises ValueError for a package that is not installed here, which has no version to pin.
    """
    environment = {key: str(value) for key, value in default_environment().items()} | {
        "platform_machine": machine
    }
    found: dict[str, str] = {}
    waiting = [(Requirement(name), "the target") for name in ("volcast", *packages)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement, wanted_by = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise ValueError(
                f"[pack] {name}, which {wanted_by} needs, is not installed here: no version to pin; pip install "
                f"'{requirement.name}{requirement.specifier}'"
            ) from error
        found[name] = Version(installed.version).public
        for needed in map(Requirement, installed.requires or ()):
            marker = needed.marker
            if marker is None or any(marker.evaluate({**environment, "extra": e}) for e in extras or {""}):
                waiting.append((needed, name))
    return {name: found[name] for name in sorted(found.keys() - {"volcast"})}
