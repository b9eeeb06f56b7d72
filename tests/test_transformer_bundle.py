"""Bundles of a VQVAE with its transformer: orders, weights, what is refused; and the commands on one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.inferers import VQVAETransformerInferer
from monai.utils.ordering import Ordering
from safetensors.torch import load_file, save_file
from token_bundles import CODES, DEEP, FLAT

from volcast.__main__ import app
from volcast.export.bundle_config import Config
from volcast.export.transformer_bundle import has_transformer, read_transformer
from volcast.export.transformer_order import read_order
from volcast.runtime.artifact import read_manifest
from volcast.runtime.token_spec import TokenSpec

SHAPE = (2, 3, 4)
TARGET = {"_target_": "monai.utils.ordering.Ordering", "spatial_dims": 3, "dimensions": [1, *SHAPE]}


def order(tmp_path: Path, **config: Any) -> tuple[int, ...]:
    return read_order(Config(config, {}, frozenset()), tmp_path, SHAPE)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ordering_type": "s_curve"},
        {"ordering_type": "raster_scan", "reflected_spatial_dims": [False, True, True]},
        {"ordering_type": "s_curve", "transpositions_axes": [[2, 0, 1], [0, 2, 1]]},
        {"ordering_type": "raster_scan", "rot90_axes": [[1, 2], [0, 1]]},
        {
            "ordering_type": "s_curve", "rot90_axes": [[0, 1]], "transpositions_axes": [[1, 0, 2]],
            "reflected_spatial_dims": [True, False, False], "transformation_order": ["rotate_90", "reflect", "transpose"],
        },
    ],
)  # fmt: skip
def test_orders_are_monais(tmp_path: Path, arguments: dict[str, Any]) -> None:
    want = Ordering(spatial_dims=3, dimensions=(1, *SHAPE), **arguments).get_sequence_ordering()
    assert order(tmp_path, ordering={**TARGET, **arguments}) == tuple(want)
    assert order(tmp_path, ordering=arguments) == tuple(want)


def test_a_raster_scan_needs_no_table_and_a_random_order_its_own(tmp_path: Path) -> None:
    assert order(tmp_path) == order(tmp_path, ordering="raster_scan") == ()
    drawn = Ordering("random", 3, (1, *SHAPE)).get_sequence_ordering()
    np.save(tmp_path / "order.npy", drawn)
    assert order(tmp_path, ordering="random", order=drawn.tolist()) == tuple(drawn)
    assert order(tmp_path, order="order.npy") == tuple(drawn)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"ordering": "random"}, "--set order="),
        ({"ordering": "spiral"}, "ordering_type must be one of"),
        (
            {"ordering": {**TARGET, "ordering_type": "s_curve", "dimensions": [1, 4, 3, 2]}},
            "token_shape=[2, 3, 4]",
        ),
        ({"ordering": {"ordering_type": "s_curve", "spatial_dims": 2}}, "do not fit"),
        ({"ordering": {"ordering_type": "s_curve", "transpositions_axes": [[0, 1]]}}, "axes"),
        ({"ordering": {"ordering_type": "s_curve", "twist": 1}}, "no argument twist"),
        ({"ordering": {"_target_": "os.system", "command": "true"}}, "is not MONAI's Ordering"),
        ({"order": [0, 1, 2]}, "3 places do not fit"),
        ({"order": [0] * 24}, "each of 0..23 once"),
        ({"order": "../order.npy"}, "outside the bundle"),
        ({"order": "missing.npy"}, "cannot read it"),
    ],
)
def test_orders_that_do_not_fit(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        order(tmp_path, **config)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"token_shape": [4, 5]}, "20 tokens: the transformer has positions for max_seq_len=16"),
        ({"token_shape": [4]}, "need 2 sizes"),
        ({"token_shape": None}, "--set token_shape=[SIZE,SIZE]"),
        ({"bos_token": 3}, "bos_token=3: need 8..8"),
        ({"ordering": "random"}, "order=FILE.npy"),
        ({"weights": "../elsewhere.safetensors"}, "inside"),
        ({"weights": "models/none.safetensors"}, "no such file"),
        ({"spacing_mm": [1, 0]}, "spacing_mm=[1, 0]"),
        ({"vqvae_def": {"_target_": "VQVAE", **FLAT.vqvae_arguments(), "embedding_dim": 5}}, "shapes"),
        ({"vqvae_def": {"_target_": "VQVAE", **FLAT.vqvae_arguments(), "act": {"x": 1}}}, "vqvae_def#act"),
        ({"vqvae_def": None}, "the config has no VQVAE"),
    ],
)
def test_bundles_that_are_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    FLAT.write(tmp_path, **changed)
    with pytest.raises(ValueError) as error:
        read_transformer(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_generative_models_names_of_the_norms(tmp_path: Path) -> None:
    DEEP.write(tmp_path)
    path = tmp_path / "models" / "both.safetensors"
    state = load_file(path)
    names = ((".norm2.", ".norm3."), (".norm_cross_attn.", ".norm2."))
    old = {next((k.replace(a, b) for a, b in names if a in k), k): value for k, value in state.items()}
    assert old.keys() != state.keys()
    save_file(old, path)
    found = read_transformer(tmp_path).transformer.state_dict()
    assert not any("causal_mask" in key for key in found)
    for key, value in found.items():
        torch.testing.assert_close(value, state[f"transformer.{key}"], rtol=0, atol=0)


def test_which_configs_are_transformers(tmp_path: Path) -> None:
    from volcast.runtime.default_artifact import BUNDLE

    assert has_transformer(DEEP.write(tmp_path), None)
    assert has_transformer(BUNDLE, Path("configs/transformer.json"))
    assert not has_transformer(BUNDLE, None)


def run(*arguments: object) -> int:
    return app([str(argument) for argument in arguments])


def test_the_commands(
    tiny_tokens: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_tokens(DEEP)
    context = torch.randn((1, 3, 8), generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "context.npy", context[0].numpy())
    given = ("-c", f"context=@{tmp_path / 'context.npy'}")
    out = tmp_path / "out.nii.gz"
    choice = ("--temperature", 1.2, "--top-k", 6, "--top-p", 0.9)
    assert run("sample", made / "artifact", "-o", out, "-n", 2, "--batch", 2, *given, *choice) == 0
    assert "12 autoregressive steps" in capsys.readouterr().out
    assert (
        run("likelihood", made / "artifact", tmp_path / "out_0.nii.gz", "-o", tmp_path / "map.nii.gz", *given)
        == 0
    )
    line = capsys.readouterr().out
    array = np.asarray(nibabel.load(tmp_path / "out_0.nii.gz").dataobj, np.float32)
    vqvae, transformer = DEEP.networks()
    want = VQVAETransformerInferer().get_likelihood(
        torch.from_numpy(array)[None, None],
        vqvae,
        transformer,
        DEEP.order(),
        context,
        resample_latent_likelihoods=True,
    )
    # The map shares a token's log p among its voxels, and MONAI repeats it.
    found = np.asarray(nibabel.load(tmp_path / "map.nii.gz").dataobj) * np.float32(array.size // 12)
    # As in test_token_model: float32 logits of size 10, MONAI's p rounded to 2^-24 / p at worst.
    allowed = 64 * 2.0**-24 * np.exp(-found.min())
    np.testing.assert_allclose(found, want[0, 0].numpy(), rtol=0, atol=allowed)
    assert f"log p {found.sum() / 8:.2f}" in line

    unlike = tmp_path / "unlike"
    unlike.mkdir()
    for name, other in (("a", 5 * array[::-1]), ("c", 3 * array[:, ::-1])):
        nibabel.save(nibabel.Nifti1Image(other, np.eye(4)), unlike / f"{name}.nii.gz")
    files = [tmp_path / "out_0.nii.gz", tmp_path / "out_1.nii.gz"]
    assert run("likelihood", made / "artifact", *files, "--against", unlike, "--json", *given) == 0
    read = json.loads(capsys.readouterr().out)
    scores = [row["log_likelihood"] for row in read["images"]]
    wins = [(a > b) + 0.5 * (a == b) for a in scores[:2] for b in scores[2:]]
    assert len(wins) == 4 and read["auc"] == np.mean(wins)

    assert run("info", made / "artifact") == 0
    assert "tokens 2 x 3 x 2 in an order of its own, 8 codes, 2 layers" in capsys.readouterr().out
    assert run("verify", made / "artifact", made / "bundle", "--json", *given) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in checks][1] == "logits, token by token" and len(checks) == 5

    other = DEEP.write(tmp_path / "other")
    path = other / "models" / "both.safetensors"
    state = load_file(path)
    save_file({key: 1.01 * value for key, value in state.items()}, path)
    assert run("verify", made / "artifact", other, *given) == 1
    assert "FAILED: weight files that differ, logits, token by token" in capsys.readouterr().out

    for words, message in (
        (("sample", made / "artifact", "-o", out, "--steps", 5, *given), "--steps"),
        (
            ("sample", made / "artifact", "-o", out, "--steps", 0, "--guidance", 0, *given),
            "--steps, --guidance: ",
        ),
        (("sample", made / "artifact", "-o", out, "--top-k", CODES + 1, *given), "top_k=9: need 1..8"),
        (("sample", made / "artifact", "-o", out, "--engine", "cuda", *given), "token by token"),
        (("likelihood", made / "artifact", *files, "-o", out, *given), "give one, not 2"),
        (
            ("likelihood", made / "artifact", unlike / "b.nii.gz", *given),
            "b.nii.gz: cannot be read (No such file",
        ),
        (("likelihood", made / "artifact", *files, "--steps", 5, *given), "has log p itself"),
        (
            ("verify", made / "artifact", made / "bundle", "--steps", 5, *given),
            "samples tokens; leave it out",
        ),
        (("quantize", made / "artifact", "-o", tmp_path / "q"), "give a diffusion model"),
    ):
        assert run(*words) == 2
        assert message in capsys.readouterr().err


def test_diffusion_models_take_no_choice(
    gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sample", gaussian, "-o", tmp_path / "a.nii.gz", "--top-k", 5) == 2
    assert "--top-k" in capsys.readouterr().err


def test_the_manifest(tiny_tokens: Callable[..., Path]) -> None:
    spec = read_manifest(tiny_tokens(DEEP) / "artifact")
    assert isinstance(spec, TokenSpec) and spec.format == 2 and spec.layers == 2
    assert spec.order == tuple(DEEP.order().get_sequence_ordering())
    assert TokenSpec.model_validate_json(spec.model_dump_json()) == spec
    data = json.loads(spec.model_dump_json())
    for changed, words in (
        ({"order": data["order"][1:]}, "each of the 12 places once"),
        ({"token_shape": [2, 3, 3]}, "order"),
        ({"token_shape": [2, 3, 3], "order": []}, "no keys_0 for 18 tokens"),
        ({"layers": 3}, "no keys_2"),
        ({"format": 1}, "format"),
        ({"spacing_mm": [1, 1]}, "spacing_mm"),
    ):
        with pytest.raises(ValueError, match=words):
            TokenSpec.model_validate({**data, **changed})
