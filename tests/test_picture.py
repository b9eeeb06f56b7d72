"""Pictures are oriented as radiology shows them, whatever the affine, with square pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from volcast.runtime.picture import mosaic, picture, planes, save_picture
from volcast.runtime.volume import Volume

SIZE = (9, 11, 13)


def ball(affine: np.ndarray, where: tuple[int, int, int]) -> Volume:
    """Zero but for one voxel `where` steps right, forward and up of the middle."""
    array = np.zeros(SIZE, np.float32)
    turned = np.linalg.inv(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    voxel = np.array([size // 2 for size in SIZE]) + np.rint(turned @ where).astype(int)
    array[tuple(voxel)] = 1
    return Volume(array, affine, (1.0, 1.0, 1.0))


RAS = np.eye(4)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PERMUTED = np.array([[0, 0, -1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("affine", [RAS, LPS, PERMUTED])
def test_right_is_left_front_and_head_are_up(affine: np.ndarray) -> None:
    def place(plane: int, where: tuple[int, int, int]) -> tuple[int, int]:
        image = planes(ball(affine, where))[plane][0]
        (row,), (column,) = np.nonzero(image)
        return row - image.shape[0] // 2, column - image.shape[1] // 2  # down, to the right

    assert place(0, (2, 1, 0)) == (-1, -2)  # axial: front up, the patient's right on the left
    assert place(1, (2, 0, 1)) == (-1, -2)  # coronal: head up, right on the left
    assert place(2, (0, 2, 1)) == (-1, -2)  # sagittal: head up, front on the left


def test_pixels_are_square_and_the_range_is_the_volume_s() -> None:
    ramp = np.linspace(0, 1, 10 * 20 * 30, dtype=np.float32).reshape(10, 20, 30)
    image = picture(Volume(ramp, np.diag([2.0, 1.0, 0.5, 1]), (2.0, 1.0, 0.5)), scale=1.0)
    # 0.5 mm a pixel: axial 40 x 40, coronal 40 x 30, sagittal 40 x 30, two gaps of 4.
    assert image.size == (40 + 40 + 40 + 8, 40) and image.mode == "L"
    assert 0 < np.asarray(image)[:, :40].mean() < 255
    flat = Volume(np.ones((4, 6), np.float32), np.eye(4), (1.0, 1.0))
    assert picture(flat, scale=2.0).size == (8, 12)


def test_a_mosaic_has_a_row_for_each_volume(tmp_path: Path) -> None:
    volumes = [ball(RAS, (1, 0, 0)), ball(RAS, (0, 1, 0))]
    one = picture(volumes[0])
    plain = mosaic(volumes)
    assert plain.size == (one.width, 2 * one.height + 4)
    np.testing.assert_array_equal(np.asarray(plain)[: one.height], np.asarray(one))
    captioned = mosaic(volumes, ["first", "second"])
    assert captioned.height == plain.height + 2 * 14
    assert np.asarray(captioned)[:14].max() > 128 > np.asarray(plain)[:14].mean()
    save_picture(captioned, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as read:
        np.testing.assert_array_equal(np.asarray(read), np.asarray(captioned))


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends in .png"):
        save_picture(picture(ball(RAS, (0, 0, 0))), tmp_path / "out.jpg")
    with pytest.raises(ValueError, match="scale=0"):
        picture(ball(RAS, (0, 0, 0)), scale=0)
    with pytest.raises(ValueError, match="0 volumes"):
        mosaic([])
