"""A small captured network as ONNX: names, free sizes, precision, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from volcast.export import to_onnx as module
from volcast.export.capture import capture
from volcast.export.to_onnx import tensor_specs, to_onnx
from volcast.runtime.spec import Precision

AXES = {0: "batch", 2: "d0", 3: "d1"}


class Small(nn.Module):
    """Doubles its input's size: an output size is four times a free block."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn((4, 4, 3, 3), generator=generator) / 6, requires_grad=False)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.norm(nn.functional.conv2d(x, self.weight, padding=1)))
        return nn.functional.interpolate(y, scale_factor=2.0)


def captured(network: nn.Module) -> tuple[GraphModule, dict[str, str]]:
    graph = capture(network, {"x": torch.zeros(2, 4, 4, 8)}, {"x": AXES}, {"d0": 2, "d1": 2})
    (x,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    names = {str(x.meta["val"].shape[axis]): name for axis, name in AXES.items()}
    out = list(graph.graph.nodes)[-1].args[0][0].meta["val"]
    return graph, names | {str(out.shape[2]): "o0", str(out.shape[3]): "o1"}


def write(path: Path, precision: Precision = Precision.FP32, network: nn.Module | None = None) -> nn.Module:
    network = (network or Small()).requires_grad_(False)
    graph, axes = captured(network)
    to_onnx(
        graph, path, tensor_specs(graph, axes, ["image"]), precision=precision, metadata={"made_by": "test"}
    )
    return network


def run(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(["image"], {"x": x.numpy()})
    assert isinstance(result, np.ndarray)
    return result


def test_names_sizes_and_values(tmp_path: Path) -> None:
    network = write(tmp_path / "small.onnx")
    model = onnx.load(tmp_path / "small.onnx")
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"x": ["batch", 4, "d0", "d1"], "image": ["batch", 4, "o0", "o1"]}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21}
    assert "GroupNormalization" in {node.op_type for node in model.graph.node}
    assert {entry.key: entry.value for entry in model.metadata_props}["made_by"] == "test"
    x = torch.randn((1, 4, 6, 10), generator=torch.Generator().manual_seed(1))
    # 36 products a value and a norm: some tens of roundings of values of order one.
    np.testing.assert_allclose(run(tmp_path / "small.onnx", x), network(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "eps"), [(Precision.FP16, 2.0**-11), (Precision.BF16, 2.0**-8)])
def test_stored_weights_are_rounded_once(tmp_path: Path, precision: Precision, eps: float) -> None:
    network = write(tmp_path / "full.onnx")
    write(tmp_path / "low.onnx", precision)
    types = {
        value.data_type for value in onnx.load(tmp_path / "low.onnx").graph.initializer if len(value.dims) > 1
    }
    wanted = onnx.TensorProto.FLOAT16 if precision is Precision.FP16 else onnx.TensorProto.BFLOAT16
    assert types == {wanted}
    x = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    stored = torch.float16 if precision is Precision.FP16 else torch.bfloat16
    network.weight.data = network.weight.data.to(stored).float()  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(run(tmp_path / "low.onnx", x), network(x).numpy(), rtol=1e-5, atol=1e-5)
    # Every weight moves by at most eps, relatively; GroupNorm scales the sum of 36 of them to order one.
    assert 0 < np.abs(run(tmp_path / "low.onnx", x) - run(tmp_path / "full.onnx", x)).max() < 36 * eps


def test_every_weight_is_stored_once(tmp_path: Path) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 300)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    write(tmp_path / "small.onnx", Precision.FP16, Linear())
    graph = onnx.load(tmp_path / "small.onnx").graph
    assert sorted(tuple(value.dims) for value in graph.initializer) == [(4, 300), (300,)]
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert all(set(node.output) & read for node in graph.node)


def test_a_weight_too_large_for_fp16_is_named(tmp_path: Path) -> None:
    network = Small()
    network.weight.data[0, 0, 0, 0] = 7e4
    with pytest.raises(ValueError, match=r"weight .* reaches 70000: too large for float16; use fp32"):
        write(tmp_path / "small.onnx", Precision.FP16, network)


def test_large_weights_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXTERNAL_BYTES", 100)
    network = write(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx.data").is_file()
    x = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(run(tmp_path / "small.onnx", x), network(x).numpy(), rtol=1e-5, atol=1e-5)


def test_a_split_along_a_free_size_is_refused(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            low, high = x.chunk(2, dim=2)
            return torch.cat((high, low), dim=2)

    with pytest.raises(ValueError, match=r"\[to_onnx\] aten.chunk.default along a free size"):
        write(tmp_path / "small.onnx", network=Halves())
