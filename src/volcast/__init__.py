"""volcast casts volumes from trained MONAI generative models, fast and without MONAI.

import volcast
model = volcast.load("artifact")  # a folder that `volcast export` wrote
volume = model.sample(seed=0, steps=50)
volume.save("out.nii.gz")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from volcast.runtime.chain import chain as chain
    from volcast.runtime.client import Client as Client
    from volcast.runtime.client_async import AsyncClient as AsyncClient
    from volcast.runtime.ensemble import Ensemble as Ensemble
    from volcast.runtime.inpaint import Inpaint as Inpaint
    from volcast.runtime.pipeline import load as load
    from volcast.runtime.volume import Volume as Volume

    __version__: str

__all__ = [
    "AsyncClient",
    "Client",
    "Ensemble",
    "Inpaint",
    "Volume",
    "__version__",
    "chain",
    "load",
]


def __getattr__(name: str) -> object:
    # Lazy: `volcast --version` and shell completion must not wait for the engines.
    if name == "chain":
        from volcast.runtime.chain import chain

        return chain
    if name == "load":
        from volcast.runtime.pipeline import load

        return load
    if name == "Client":
        from volcast.runtime.client import Client

        return Client
    if name == "AsyncClient":
        from volcast.runtime.client_async import AsyncClient

        return AsyncClient
    if name == "Ensemble":
        from volcast.runtime.ensemble import Ensemble

        return Ensemble
    if name == "Inpaint":
        from volcast.runtime.inpaint import Inpaint

        return Inpaint
    if name == "Volume":
        from volcast.runtime.volume import Volume

        return Volume
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("volcast")
        except PackageNotFoundError:
            return "0+uninstalled"
    raise AttributeError(f"module 'volcast' has no attribute {name!r}")
