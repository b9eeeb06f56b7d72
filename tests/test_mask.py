"""Label maps as NIfTI files: what lies on the model's grid is taken, everything else is named with its remedy."""

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

from volcast.runtime.artifact import read_artifact
from volcast.runtime.condition_text import mask_texts, parse_conditions
from volcast.runtime.conditions import resolve
from volcast.runtime.job import make_job
from volcast.runtime.mask import read_on_grid
from volcast.runtime.request import make_request
from volcast.runtime.sizes import latent_sizes
from volcast.runtime.spec import ArtifactSpec, ConditionSpec
from volcast.runtime.volume import Volume

MASK = ConditionSpec(
    name="mask", dtype="int64", shape=("o0", "o1", "o2"), minimum=0, maximum=2, labels=("air", "liver", "tumour")
)  # fmt: skip
SECOND = ConditionSpec(name="mask_2", dtype="int64", shape=("o0", "o1", "o2"), minimum=0, maximum=255)
HINT = ConditionSpec(name="hint", shape=(1, "o0", "o1", "o2"))
AFFINE = np.array([[1.0, 0, 0, 5], [0, 1.5, 0, -7], [0, 0, 2, 9], [0, 0, 0, 1]])
SHAPE = (8, 12, 8)  # latents of 4 x 6 x 4, doubled


@pytest.fixture
def spec(gaussian: Path) -> ArtifactSpec:
    return read_artifact(gaussian).model_copy(update={"conditions": (MASK,)})


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, code: int = 1) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    nibabel.save(image, path)
    return path


def labels(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 3).reshape(shape).astype(np.uint8)


def test_a_label_map_is_taken_with_its_place(spec: ArtifactSpec, tmp_path: Path) -> None:
    path = save(tmp_path / "label.nii.gz", labels())
    (text,) = mask_texts(spec, [str(path)])
    given = parse_conditions(spec, [text])
    assert isinstance(given["mask"], Volume)
    np.testing.assert_array_equal(given["mask"].affine, AFFINE)
    found = resolve(spec, given, latent_sizes(spec)[1]).values["mask"]
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, labels())


def test_an_image_gets_the_channel_that_its_condition_has(spec: ArtifactSpec, tmp_path: Path) -> None:
    image = np.linspace(-1, 1, 768, dtype=np.float32).reshape(SHAPE)
    path = save(tmp_path / "flair.nii", image)
    with_hint = spec.model_copy(update={"conditions": (HINT,)})
    given = parse_conditions(with_hint, [f"hint=@{path}"])
    np.testing.assert_array_equal(
        resolve(with_hint, given, latent_sizes(spec)[1]).values["hint"], image[None]
    )


def test_several_label_maps_have_names(spec: ArtifactSpec) -> None:
    two = spec.model_copy(update={"conditions": (MASK, SECOND)})
    assert mask_texts(two, ["mask=a.nii", "mask_2=b=c.nii"]) == ["mask=@a.nii", "mask_2=@b=c.nii"]
    assert mask_texts(spec, ["folder=1/a.nii"]) == ["mask=@folder=1/a.nii"]
    with pytest.raises(ValueError, match="several label maps: write mask=FILE or mask_2=FILE"):
        mask_texts(two, ["a.nii"])
    with pytest.raises(ValueError, match="takes no label map; export it with --controlnet"):
        mask_texts(spec.model_copy(update={"conditions": ()}), ["a.nii"])


def test_a_slice_for_a_model_of_slices(spec: ArtifactSpec, tmp_path: Path) -> None:
    flat = spec.model_copy(update={"latent_shape": (2, 4, 6), "spacing_mm": (1.0, 1.5)})
    path = save(tmp_path / "slice.nii", labels((8, 12, 1)))
    assert read_on_grid(path, flat).array.shape == (8, 12)
    with pytest.raises(ValueError, match="need one slice"):
        read_on_grid(save(tmp_path / "volume.nii", labels()), flat)


TURNED = AFFINE @ np.diag([-1.0, 1, 1, 1])


@pytest.mark.parametrize(
    ("affine", "code", "message"),
    [
        (AFFINE, 0, "has no affine (sform and qform codes are 0)"),
        (
            TURNED,
            1,
            "has axes LAS: need RAS, as the volumes that are sampled; turn it with nibabel.as_closest",
        ),
        (AFFINE[[1, 0, 2, 3]], 1, "has axes ARS: need RAS"),
        (
            AFFINE @ np.diag([1, 1, 1.1, 1]),
            1,
            "has voxels of 1 x 1.5 x 2.2 mm: the model has 1 x 1.5 x 2; resample",
        ),
    ],
)
def test_what_lies_elsewhere(
    spec: ArtifactSpec, tmp_path: Path, affine: np.ndarray, code: int, message: str
) -> None:
    path = save(tmp_path / "label.nii", labels(), affine, code)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_conditions(spec, [f"mask=@{path}"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_voxels_go_unchecked_where_the_bundle_did_not_say(spec: ArtifactSpec, tmp_path: Path) -> None:
    path = save(tmp_path / "label.nii", labels(), AFFINE @ np.diag([2.0, 2, 2, 1]))
    assumed = spec.model_copy(update={"provenance": {"spacing_mm": "assumed 1 mm"}})
    assert read_on_grid(path, assumed).spacing_mm == (2, 3, 4)
    with pytest.raises(ValueError, match="has voxels"):
        read_on_grid(path, spec)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            labels((8, 12, 6)),
            r"mask has shape \(8, 12, 6\): axis o2 is 8 here, the whole \(8, 12, 8\); crop, pad or",
        ),
        (labels((8, 12, 1)), r"mask has shape \(8, 12, 1\): axis o2 is 8 here"),
        (labels((12, 8)), r"mask has shape \(12, 8\): need \(o0, o1, o2\), without a batch axis"),
        (labels() + 3, "unknown labels 3, 4, 5: the model knows 0 air, 1 liver, 2 tumour; map the others"),
        (labels().astype(int) - 1, "unknown labels -1: the model knows 0 air"),
        (labels() + 0.5, "fractions"),
    ],
)
def test_another_size_and_unknown_labels(spec: ArtifactSpec, array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_job(spec, make_request(spec, 0, {}), 1, 1, {"mask": array}, None)
    assert "\n" not in str(error.value)


def test_the_mask_follows_the_latent_s_size(spec: ArtifactSpec) -> None:
    job = make_job(spec, make_request(spec, 0, {}), 1, 1, {"mask": labels((16, 12, 8))}, (8, 6, 4))
    assert job.conditional[0]["mask"].shape == (16, 12, 8)
    with pytest.raises(ValueError, match=r"axis o0 is 16 here"):
        make_job(spec, make_request(spec, 0, {}), 1, 1, {"mask": labels()}, (8, 6, 4))


def test_only_a_label_map_has_labels() -> None:
    assert MASK.is_mask and not HINT.is_mask
    with pytest.raises(ValueError, match="1 labels need a label map of 0..0"):
        ConditionSpec(name="hint", shape=(1, "o0"), labels=("one",))
