"""A classifier's gradient as a program, against torch's autograd in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import anomaly_models
import numpy as np
import pytest
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelEncoder
from torch import Tensor, nn
from torch.nn import functional

from volcast.__main__ import app
from volcast.export.gradient import add_classifier, write_gradient
from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.spec import ProgramSpec


@pytest.fixture(scope="module")
def small(shared_folder: Any) -> Path:
    return shared_folder("anomaly", anomaly_models.make)


class Tokens(nn.Module):
    """What MONAI's encoder has only with a context: layer norm, GELU, softmax; and a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.norm, self.wide = nn.LayerNorm(6), nn.Linear(6, 12)
        self.pool, self.out = nn.AvgPool2d(2), nn.Linear(6, 4)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        h = self.convolution(x) * (1 + torch.cos(timesteps))[:, None, None, None]
        tokens = self.norm(self.pool(h).flatten(2).transpose(1, 2))
        first, second = self.wide(tokens).chunk(2, dim=-1)
        mixed = torch.softmax(tokens @ second.transpose(1, 2), dim=-1) @ (first * functional.gelu(second))
        return self.out(torch.cat((mixed, tokens), 1).mean(1))


class Sorted(nn.Module):
    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return x.flatten(1).sort(1).values


def check(path: Path, program: ProgramSpec, classifier: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    exact = copy.deepcopy(classifier).double()
    shape = program.inputs[0].shape[1:]
    assert program.flops > 0
    for engine in ("onnxruntime", "openvino"):
        for count in (1, 3):
            x = torch.randn((count, *(int(size) for size in shape)), generator=generator)
            given = x.double().requires_grad_(True)
            log_p = exact(given, torch.full((count,), 17.0)).log_softmax(1)
            label = int(log_p.sum(0).argmin())  # a class that is certain has no gradient
            (wanted,) = torch.autograd.grad(log_p[:, label].sum(), given)
            opened = open_engine(engine, 1).open(path, program, {"batch": count})
            timesteps = np.full(count, 17.0, np.float32)
            found = opened({"x": x.numpy(), "timesteps": timesteps, "label": np.full(count, label)})
            assert wanted.abs().max() > 0.1
            # 200 operators each way, each rounding once; the sums of a convolution's 100 terms cancel up to tenfold.
            close = 200 * 2 * 10 * 2.0**-24
            for name, exactly in (("gradient", wanted), ("log_p", log_p.detach())):
                np.testing.assert_allclose(
                    found[name], exactly.numpy(), rtol=0, atol=close * float(exactly.abs().max())
                )


def test_monai_s_encoder_in_2d(small: Path) -> None:
    plain, classified = (read_artifact(small / name) for name in ("plain", "classified"))
    assert plain.programs.items() < classified.programs.items()
    program = classified.programs["gradient"]
    assert program.inputs[0].shape == ("batch", *anomaly_models.SHAPE)
    check(small / "classified" / program.file, program, anomaly_models.classifier())


def test_monai_s_encoder_in_3d_with_pools(tmp_path: Path) -> None:
    network = anomaly_models.classifier(3, (2, 4, 8, 4), resblock_updown=True)
    path = tmp_path / "gradient.onnx"
    check(path, write_gradient(network, (2, 4, 8, 4), path), network)


def test_layer_norm_gelu_softmax_and_pool(tmp_path: Path) -> None:
    network = anomaly_models.randomised(Tokens(), 3, 0.5)
    path = tmp_path / "gradient.onnx"
    check(path, write_gradient(network, anomaly_models.SHAPE, path), network)


def test_the_command_reads_a_bundle_s_classifier(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same program to the byte as of the network itself, whatever its weights are called."""
    arguments = {
        "spatial_dims": 2, "in_channels": 1, "out_channels": anomaly_models.CLASSES, "input_shape": [8, 12],
        "num_res_blocks": 1, "num_channels": [8, 16], "attention_levels": [False, True], "norm_num_groups": 4,
        "num_head_channels": 8,
    }  # fmt: skip
    config = {
        "classifier_def": {"_target_": "DiffusionModelEncoder", **arguments},
        "other": {"_target_": "VQVAE"},
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(config))
    torch.save(anomaly_models.classifier().state_dict(), tmp_path / "classifier.pt")
    words = ["classifier", str(small / "plain"), str(tmp_path), "-o", str(tmp_path / "out")]
    assert app(words) == 2
    assert "--weights classifier=FILE" in capsys.readouterr().err
    assert (
        app([*words, "--set", "classifier=other", "--weights", f"classifier={tmp_path / 'classifier.pt'}"])
        == 2
    )
    assert "need one DiffusionModelEncoder" in capsys.readouterr().err
    weights = ["--weights", f"classifier={tmp_path / 'classifier.pt'}"]
    assert app([*words, *weights, "--set", "classifier_def#input_shape=[16, 12]"]) == 2
    told = capsys.readouterr().err
    assert "classifier_def takes x of 1 x 16 x 12" in told and "the artifact's latent is 1 x 8 x 12" in told
    assert told.count("\n") == 1  # no trace of torch's before it
    assert app([*words, "--weights", f"classifier={tmp_path / 'classifier.pt'}"]) == 0
    assert "a classifier of 3 classes" in capsys.readouterr().out
    made, wanted = (read_artifact(folder) for folder in (tmp_path / "out", small / "classified"))
    assert made.files["gradient.onnx"] == wanted.files["gradient.onnx"]
    assert made.provenance["classifier_file"] == "classifier.pt"
    assert app(words) == 2
    assert "exists" in capsys.readouterr().err


def test_what_is_refused(small: Path, tmp_path: Path) -> None:
    conditioned = DiffusionModelEncoder(
        spatial_dims=2, in_channels=1, out_channels=2, input_shape=(8, 12), channels=(8,), num_res_blocks=1,
        attention_levels=(False,), norm_num_groups=4, num_class_embeds=3,
    )  # fmt: skip
    for network, message in (
        (anomaly_models.classifier(2, (1, 16, 12)), "DiffusionModelEncoder on x \\(1, 8, 12\\): no gradient"),
        (conditioned, "class_labels should be provided"),
        (Sorted(), "sort.default has no ONNX form"),
    ):
        with pytest.raises(ValueError, match=message):
            add_classifier(small / "plain", network, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists"):
        add_classifier(small / "plain", anomaly_models.classifier(), small / "classified")
