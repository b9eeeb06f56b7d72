"""What MAISI's bundles leave to their scripts: names and units of the UNet's inputs, and the intensities of CT."""

from __future__ import annotations

from collections.abc import Sequence

from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from volcast.export.bundle_config import Config, shown, validated
from volcast.export.bundle_networks import NetworkPlan
from volcast.runtime.intensity import IntensitySpec
from volcast.runtime.spec import ConditionField, ConditionSpec

# scripts/sample.py and diff_model_infer.py multiply one-hot regions and millimetres by 100.
FACTOR = 100.0
REGIONS = ("head", "chest", "abdomen", "pelvis")
# The tutorials' default: from the chest down to the abdomen.
_DEFAULT_REGIONS = {"top_region_index_tensor": "chest", "bottom_region_index_tensor": "abdomen"}
CT = IntensitySpec(network=(0.0, 1.0), written=(-1000.0, 1000.0), unit="HU")
"""scripts/sample.py: the decoded image is clipped to 0..1 and spread over -1000..1000 HU."""
_LARGEST_SPACING = 100.0


def named_inputs(
    conditions: Sequence[ConditionSpec], spacing_mm: Sequence[float]
) -> tuple[ConditionSpec, ...]:
    """The same with a field for each number of MAISI's region and spacing inputs.

    `spacing_0..2`: the voxel size in mm, by default that of the volumes, `spacing_mm`; `top_head`, `bottom_pelvis` and
    so on: 1 for the body region that is at the top or bottom of the volume, 0 for the others.
    """
    return tuple(_named(one, spacing_mm) for one in conditions)


def _named(condition: ConditionSpec, spacing_mm: Sequence[float]) -> ConditionSpec:
    if condition.name == "spacing_tensor":
        fields = tuple(
            ConditionField(
                name=f"spacing_{axis}", minimum=0, maximum=_LARGEST_SPACING, default=min(size, _LARGEST_SPACING),
                factor=FACTOR, description=f"voxel size in mm along axis {axis}",
            )
            for axis, size in enumerate(spacing_mm)
        )  # fmt: skip
        return condition.model_copy(update={"fields": fields})
    if condition.name in _DEFAULT_REGIONS:
        end = condition.name.partition("_")[0]
        fields = tuple(
            ConditionField(
                name=f"{end}_{region}", minimum=0, maximum=1, factor=FACTOR,
                default=float(region == _DEFAULT_REGIONS[condition.name]),
                description=f"1: the volume's {end} is in this region ({region}), 0: it is not",
            )
            for region in REGIONS
        )  # fmt: skip
        return condition.model_copy(update={"fields": fields})
    return condition


def plan_intensity(read: Config, autoencoder: NetworkPlan | None) -> tuple[IntensitySpec | None, str]:
    """The intensities of volumes, and where they were found: the key `intensity` (null: the network's own), or MAISI's
    of CT for its image autoencoder unless the config names another `modality`.

    Raises ValueError: an `intensity` that is none.
    """
    if "intensity" in read:
        stated = read.need("intensity")
        if not isinstance(stated, dict):
            raise ValueError(
                f"[bundle] intensity={shown(stated)}: need null, or as --set intensity="
                '\'{"network":[0,1],"written":[-1000,1000],"unit":"HU"}\''
            )
        return validated(IntensitySpec, stated, "intensity"), "config"
    modality = read.need("modality") if "modality" in read else None
    if read.has_key("intensity") or autoencoder is None:
        return None, "the network's own"
    images = autoencoder.kind.network is AutoencoderKlMaisi and autoencoder.arguments["out_channels"] == 1
    if images and (modality is None or str(modality).lower() == "ct"):
        return CT, "MAISI's CT" if modality else "MAISI's CT (the config names no modality)"
    return None, "the network's own"
