"""Healing against the loop of MONAI's tutorial, which runs the whole prefix again for every token; `volcast heal`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_bundles import CODES, DEEP, FLAT, Tiny

import volcast
from volcast import Volume
from volcast.__main__ import app
from volcast.runtime.healing import heal_tokens, unlikely
from volcast.runtime.token_sequence import TokenSequence
from volcast.runtime.volume import read_nifti


@pytest.fixture(scope="module", params=[FLAT, DEEP], ids=["2D", "3D"])
def pair(request: pytest.FixtureRequest, tiny_tokens: Callable[[Tiny], Path]) -> Any:
    return request.param, volcast.load(
        tiny_tokens(request.param) / "artifact", engine="onnxruntime", threads=1
    )


def context(tiny: Tiny) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((1, tiny.context_tokens, 8), generator=generator) if tiny.context_tokens else None


def tutorials_loop(tiny: Tiny, image: torch.Tensor, quantile: float) -> tuple[Any, Any, Any]:
    """Mask, healed codes and |x - x_hat| * mask as anomaly_detection_with_transformers has them, with MONAI's networks."""
    vqvae, transformer = tiny.networks()
    order, shown = torch.as_tensor(tiny.order().get_sequence_ordering()), context(tiny)
    with torch.no_grad():
        codes = vqvae.index_quantize(image)
        flat = codes.reshape(1, -1)[:, order]
        sequence = torch.nn.functional.pad(flat, (1, 0), value=CODES).long()
        probabilities = transformer(sequence[:, :-1], context=shown).softmax(-1)
        log_p = probabilities.gather(2, flat[..., None].long())[0, :, 0].log()
        mask = log_p < torch.quantile(log_p, quantile)
        for i in range(1, sequence.shape[1]):
            if mask[i - 1]:
                p = transformer(sequence[:, :i], context=shown).softmax(-1)
                p[:, :, CODES] = 0
                sequence[:, i] = p[0, -1].argmax()
        back = torch.argsort(order)
        healed = sequence[:, 1:][:, back].reshape(codes.shape)
        grid = mask[back].reshape(codes.shape)
        decoded = vqvae.decode_samples(healed)
        voxels = torch.nn.functional.interpolate(grid[None].float(), scale_factor=2)
    return grid[0].numpy(), healed[0].numpy(), ((image - decoded).abs() * voxels)[0].numpy()


def picture(tiny: Tiny) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn((1, 1, *(2 * size for size in tiny.token_shape)), generator=generator)


@pytest.mark.parametrize("quantile", [0.05, 0.4])
def test_the_tutorials_loop(pair: Any, quantile: float) -> None:
    tiny, model = pair
    image, given = picture(tiny), context(tiny)
    masked, tokens, difference = tutorials_loop(tiny, image, quantile)
    condition = {} if given is None else {"context": given[0].numpy()}
    found = model.heal(image[0].numpy(), quantile=quantile, condition=condition)
    np.testing.assert_array_equal(found.masked, masked)
    np.testing.assert_array_equal(found.tokens, tokens)
    assert 0 < masked.sum() < masked.size and (tokens != model.encode(image[0].numpy())[0]).any()
    # One decode in float32, of a few hundred products a value.
    np.testing.assert_allclose(found.difference, difference, rtol=0, atol=1e-5 * np.abs(difference).max())


def test_blocks_change_nothing(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known stretches run in blocks; one by one they give the same codes, whatever is masked."""
    tiny, model = pair
    codes, given = model.encode(picture(tiny)[0].numpy()).reshape(-1)[model.order], context(tiny)
    cross = model._prepared(model._conditions({} if given is None else {"context": given[0].numpy()}), 1)
    rng = np.random.default_rng(0)
    for part in (0.0, 0.1, 0.3, 1.0):
        masked = rng.random(model.spec.length) < part
        every = []
        for size in (1, 2, 3, model.spec.length):
            monkeypatch.setattr("volcast.runtime.healing.block_size", lambda spec, size=size: size)
            sequence = TokenSequence(model.spec, model._programs, 1, cross)
            every.append(heal_tokens(sequence, model.spec, codes, masked))
        assert all((one == every[0]).all() for one in every)
        np.testing.assert_array_equal(every[0][~masked], codes[~masked])


def test_the_command(
    tiny_tokens: Callable[[Tiny], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, image = tiny_tokens(DEEP) / "artifact", picture(DEEP)[0, 0].numpy()
    affine = np.array([[1.0, 0, 0, 5], [0, 1, 0, -7], [0, 0, 1, 9], [0, 0, 0, 1]])
    scan = Volume(image, affine, (1.0, 1.0, 1.0))
    scan.save(tmp_path / "scan.nii.gz")
    more = [] if context(DEEP) is None else ["-c", f"context=@{tmp_path / 'context.npy'}"]
    if more:
        np.save(tmp_path / "context.npy", context(DEEP)[0].numpy())  # type: ignore[index]
    words = ["heal", artifact, tmp_path / "scan.nii.gz", "-o", tmp_path / "map.nii.gz", "--healed",
             tmp_path / "healed.nii.gz", "--quantile", 0.2, "--engine", "onnxruntime", "--json", *more]  # fmt: skip
    assert app([str(word) for word in words]) == 0
    told = json.loads(capsys.readouterr().out)
    found, healed = read_nifti(tmp_path / "map.nii.gz"), read_nifti(tmp_path / "healed.nii.gz")
    np.testing.assert_array_equal(found.affine, scan.affine)
    where = found.array != 0
    assert told["replaced"] * 8 == where.sum() and told["tokens"] == where.size // 8
    np.testing.assert_array_equal(found.array[where], np.abs(image - healed.array)[where])


def test_refusals(pair: Any) -> None:
    tiny, model = pair
    given = context(tiny)
    condition = {} if given is None else {"context": given[0].numpy()}
    with pytest.raises(ValueError, match=r"\[heal\] quantile=1: need above 0 and below 1"):
        model.heal(picture(tiny)[0].numpy(), quantile=1, condition=condition)
    with pytest.raises(ValueError, match=r"\[heal\] image holds 2 images: give one"):
        model.heal(np.concatenate([picture(tiny).numpy()] * 2), condition=condition)
    assert not unlikely(np.zeros(4), 0.5).any()
