"""The GPU that is here, asked of the driver alone."""

from __future__ import annotations

from dataclasses import dataclass

from volcast import _core


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`capability` is 86 for 8.6."""

    name: str
    capability: int
    driver: _core.Driver


def local_gpu(operation: str) -> Gpu:
    """The first GPU. Raises ValueError, with `operation` in front, where there is no GPU or driver."""
    try:
        driver = _core.Driver.cuda()
    except ValueError as error:
        raise ValueError(f"[{operation}] needs an NVIDIA GPU: {error}") from error
    return Gpu(name=driver.device_name, capability=driver.capability, driver=driver)
