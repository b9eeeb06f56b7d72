"""fuse_layout and fuse_attention: nothing is rearranged any more, and the numbers stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from onnx import TensorProto, helper, numpy_helper
from onnx_oracle import check_draft, program_inputs
from torch import Tensor

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.device_passes.fuse_attention import fuse_attention
from volcast.export.device_passes.fuse_layout import fuse_layout
from volcast.export.draft import Draft
from volcast.export.lower import lower
from volcast.runtime.artifact import read_artifact
from volcast.runtime.spec import ConditionSpec, SchedulerSpec

RAW = {"transpose", "reshape", "softmax", "matmul", "einsum"}


def kinds(draft: Draft) -> Counter[str]:
    return Counter(one.kind for one in draft.operations)


def checked(path: Path, *inputs: dict[str, Tensor]) -> Draft:
    """The program after both passes, each checked and found to have nothing left to do."""
    draft = lower(path)
    for one in (fuse_layout, fuse_attention):
        draft = one(draft)
        for given in inputs:
            check_draft(draft, path, given)
        assert one(draft).operations == draft.operations
    return draft


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "decode", "encode"])
def test_the_bundled_model(name: str, default_artifact_folder: Path) -> None:
    spec = read_artifact(default_artifact_folder)
    program = spec.programs[name]  # type: ignore[index]
    path = default_artifact_folder / program.file
    draft = checked(
        path, *(program_inputs(spec, program, batch, large) for batch, large in ((1, "0"), (2, "12")))
    )
    found = kinds(draft)
    assert not RAW & found.keys()
    assert all(draft.weights[one.inputs[1] or ""].shape[2:].numel() > 1
               for one in draft.operations if one.kind == "convolution")  # fmt: skip
    if name == "step":
        assert found["attention"] == found["tokens"] == found["volume"] == 7
        assert_reads_one_product(draft)
        for one in draft.operations:
            if one.kind == "volume":  # the norm before the block: what nobody would wait for
                assert draft.producer[one.inputs[1] or ""].kind == "group_norm"


def assert_reads_one_product(draft: Draft) -> None:
    """q, k, v of every attention are the columns of one product, in this order."""
    for one in draft.operations:
        if one.kind == "attention":
            parts = [draft.producer[name or ""] for name in one.inputs]
            assert len({part.inputs for part in parts}) == 1
            assert draft.producer[parts[0].inputs[0] or ""].kind == "linear"
            assert [part.settings["stop"] for part in parts[:2]] == [
                part.settings["start"] for part in parts[1:]
            ]


NETWORKS: dict[str, dict[str, Any]] = {
    "self": {"num_head_channels": 8},
    "combined": {"num_head_channels": 8, "use_combined_linear": True},
    "flash": {"num_head_channels": 8, "use_flash_attention": True},
    "cross": {"num_head_channels": 8, "with_conditioning": True, "cross_attention_dim": 5},
    "cross, flash": {
        "num_head_channels": 8, "with_conditioning": True, "cross_attention_dim": 5, "use_flash_attention": True,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "name"), [(2, "self"), (2, "cross"), *((3, name) for name in NETWORKS)])
def test_monai_s_attentions(name: str, axes: int, tmp_path: Path) -> None:
    settings = NETWORKS[name]
    unet = DiffusionModelUNet(
        spatial_dims=axes, in_channels=2, out_channels=2, num_res_blocks=1, channels=(8, 16), norm_num_groups=4,
        attention_levels=(False, True), **settings,
    ).eval().requires_grad_(False)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    crossed = "with_conditioning" in settings
    bundle = Bundle(
        name="small", unet=unet, autoencoder=None, scheduler=SchedulerSpec(), scale_factor=1.0,
        latent_shape=(2, *[8] * axes), spacing_mm=(1.0,) * axes,
        conditions=(ConditionSpec(name="context", shape=(3, 5)),) if crossed else (), provenance={},
    )  # fmt: skip
    spec = export_bundle(bundle, tmp_path / "artifact")
    step = spec.programs["step"]
    inputs = [program_inputs(spec, step, batch, large) for batch, large in ((1, "0"), (2, "1"))]
    draft = checked(tmp_path / "artifact" / step.file, *inputs)
    found = kinds(draft)
    blocks = 4
    assert found["tokens"] == found["volume"] == blocks
    assert found["attention"] == blocks * (1 + crossed)
    assert not RAW & found.keys() - ({"reshape", "transpose"} if crossed else set())
    # Keys and values from `prepare` come as heads: each is turned to tokens once, and nothing else is.
    assert found["transpose"] == (2 * blocks if crossed else 0)


def write(path: Path, nodes: list, inputs: dict[str, list], out: list, weights: dict[str, Any]) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, out)
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    made = [helper.make_node(*node[:3], **node[3]) for node in nodes]
    graph = helper.make_graph(made, "g", values, [result], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def drawn(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in zip("xyz", shapes, strict=False)}


VOLUME = ["n", 4, "d", "h", "w"]
INTS = {
    "first": np.array([0], np.int64), "four": np.array([4], np.int64), "flat": np.array([0, 4, -1], np.int64),
    "rows": np.array([0, -1, 4], np.int64),
}  # fmt: skip
SHAPES = [("Shape", ["x"], [f"s{i}"], {"start": i + 2, "end": i + 3}) for i in range(3)]


def test_views_that_take_each_other_back_go(tmp_path: Path) -> None:
    """Both ways to tokens, both ways back; what stays is the sum."""
    nodes = [
        *SHAPES, ("Reshape", ["x", "flat"], ["a"], {}), ("Transpose", ["a"], ["t"], {"perm": [0, 2, 1]}),
        ("Concat", ["first", "s0", "s1", "s2", "four"], ["last"], {"axis": 0}), ("Reshape", ["t", "last"], ["b"], {}),
        ("Transpose", ["b"], ["u"], {"perm": [0, 4, 1, 2, 3]}), ("Exp", ["u"], ["e"], {}),
        ("Transpose", ["e"], ["c"], {"perm": [0, 2, 3, 4, 1]}), ("Reshape", ["c", "rows"], ["v"], {}),
        ("Transpose", ["v"], ["d"], {"perm": [0, 2, 1]}),
        ("Concat", ["first", "four", "s0", "s1", "s2"], ["second"], {"axis": 0}),
        ("Reshape", ["d", "second"], ["f"], {}), ("Add", ["f", "x"], ["out"], {}),
    ]  # fmt: skip
    path = write(tmp_path / "views.onnx", nodes, {"x": VOLUME}, VOLUME, INTS)
    draft = checked(path, drawn((1, 4, 2, 3, 5)), drawn((2, 4, 3, 2, 2)))
    assert [one.kind for one in draft.operations] == ["pointwise", "pointwise"]


@pytest.mark.parametrize("order", [[0, 3, 2, 4, 1], [0, 2, 3, 1, 4]])
def test_other_orders_are_no_tokens(order: list[int], tmp_path: Path) -> None:
    """A volume whose axes change places: the rearrangement is real and stays."""
    nodes = [("Transpose", ["x"], ["t"], {"perm": order}), ("Reshape", ["t", "three"], ["out"], {})]
    path = write(
        tmp_path / "o.onnx", nodes, {"x": VOLUME}, ["n", "l", 4], {"three": np.array([0, -1, 4], np.int64)}
    )
    draft = checked(path, drawn((2, 4, 2, 3, 4)))
    assert kinds(draft) == {"transpose": 1, "reshape": 1}


@pytest.mark.parametrize("settings", [{"strides": [2, 2, 2]}, {"pads": [1] * 6}, {"group": 2}, {}])
def test_convolutions_of_one_tap(settings: dict, tmp_path: Path) -> None:
    weight = (
        np.random.default_rng(0)
        .standard_normal((6, 4 // settings.get("group", 1), 1, 1, 1))
        .astype(np.float32)
    )
    nodes = [("Conv", ["x", "w", "b"], ["out"], settings)]
    weights = {"w": weight, "b": np.arange(6, dtype=np.float32)}
    path = write(tmp_path / "c.onnx", nodes, {"x": VOLUME}, ["n", 6, "a", "b", "c"], weights)
    draft = checked(path, drawn((2, 4, 2, 3, 4)))
    assert kinds(draft) == {"convolution" if settings else "linear": 1}


def attention(scores: list, tail: list) -> list:
    return [*scores, ("Softmax", ["s"], ["p"], {"axis": -1}), *tail]


@pytest.mark.parametrize(
    ("nodes", "scale"),
    [
        ([("Einsum", ["x", "y"], ["r"], {"equation": "blc,bmc->blm"}), ("Mul", ["half", "r"], ["s"], {})], 0.5),
        ([("Mul", ["x", "half"], ["a"], {}), ("Transpose", ["y"], ["t"], {"perm": [0, 2, 1]}),
          ("MatMul", ["a", "t"], ["r"], {}), ("Div", ["r", "half"], ["s"], {})], 1.0),
        ([("Mul", ["y", "half"], ["k"], {}), ("Transpose", ["k"], ["t"], {"perm": [0, 2, 1]}),
          ("Mul", ["t", "half"], ["u"], {}), ("MatMul", ["x", "u"], ["s"], {})], 0.25),
    ],
)  # fmt: skip
def test_one_head_however_scaled(nodes: list, scale: float, tmp_path: Path) -> None:
    """Queries x of one length, keys y and values z of another."""
    tokens = {"x": ["n", "l", 8], "y": ["n", "m", 8], "z": ["n", "m", 8]}
    tail = [("Einsum", ["p", "z"], ["out"], {"equation": "blm,bmc->blc"})]
    path = write(
        tmp_path / "a.onnx", attention(nodes, tail), tokens, ["n", "l", 8], {"half": np.float32(0.5)}
    )
    draft = checked(path, drawn((1, 3, 8), (1, 5, 8), (1, 5, 8)), drawn((2, 4, 8), (2, 2, 8), (2, 2, 8)))
    (one,) = draft.operations
    assert (one.kind, one.settings, one.inputs) == (
        "attention",
        {"heads": 1, "scale": scale},
        ("x", "y", "z"),
    )


@pytest.mark.parametrize(
    ("axis", "equation", "width"),
    [(1, "blm,bmc->blc", 8), (-1, "blm,bcm->blc", 8), (-1, "bml,bmc->blc", 8), (-1, "blm,bmc->blc", 4)],
)
def test_other_products_are_no_attention(axis: int, equation: str, width: int, tmp_path: Path) -> None:
    """Softmax over the queries, other equations, heads of a width that the kernels do not take."""
    nodes = [
        ("Einsum", ["x", "y"], ["s"], {"equation": "blc,bmc->blm"}), ("Softmax", ["s"], ["p"], {"axis": axis}),
        ("Einsum", ["p", "z"], ["out"], {"equation": equation}),
    ]  # fmt: skip
    tokens = {name: ["n", 8, width] for name in "xyz"}
    path = write(tmp_path / "n.onnx", nodes, tokens, ["n", 8, width], {})
    draft = checked(path, drawn(*[(2, 8, width)] * 3))
    assert kinds(draft) == {"einsum": 2, "softmax": 1}


def test_a_free_axis_is_no_axis_of_heads(tmp_path: Path) -> None:
    """Attention along rows of an image: how many rows there are is not known before the run."""
    nodes = [
        ("Transpose", ["x"], ["t"], {"perm": [0, 2, 1, 3]}),
        ("Einsum", ["t", "t"], ["s"], {"equation": "bhld,bhmd->bhlm"}), ("Softmax", ["s"], ["p"], {"axis": -1}),
        ("Einsum", ["p", "t"], ["o"], {"equation": "bhlm,bhmd->bhld"}),
        ("Transpose", ["o"], ["out"], {"perm": [0, 2, 1, 3]}),
    ]  # fmt: skip
    path = write(tmp_path / "rows.onnx", nodes, {"x": ["n", "l", "h", 8]}, ["n", "l", "h", 8], {})
    draft = checked(path, drawn((2, 3, 5, 8)), drawn((1, 2, 4, 8)))
    assert "attention" not in kinds(draft)


def test_products_of_one_vector_become_one(tmp_path: Path) -> None:
    """Three projections of an embedding, one without bias; a fourth that is returned stays apart."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {f"w{i}": rng.standard_normal((4, 4)).astype(np.float32) for i in range(4)}
    weights |= {f"b{i}": rng.standard_normal(4).astype(np.float32) for i in range(2)}
    weights["five"] = np.array([0, 4, 1, 1, 1], np.int64)
    nodes: list = [("MatMul", ["y", f"w{i}"], [f"m{i}"], {}) for i in range(4)]
    nodes += [("Add", [f"m{i}", f"b{i}"], [f"p{i}"], {}) for i in range(2)]
    nodes += [("Reshape", [name, "five"], [f"{name}v"], {}) for name in ("p0", "p1", "m2")]
    nodes += [
        ("Add", ["x", "p0v"], ["a"], {}), ("Add", ["a", "p1v"], ["b"], {}), ("Add", ["b", "m2v"], ["c"], {}),
        ("Softmax", ["m3"], ["q"], {"axis": -1}), ("Reshape", ["q", "five"], ["qv"], {}),
        ("Mul", ["c", "qv"], ["out"], {}),
    ]  # fmt: skip
    path = write(tmp_path / "p.onnx", nodes, {"x": VOLUME, "y": ["n", 4]}, VOLUME, weights)
    draft = checked(path, drawn((1, 4, 2, 3, 4), (1, 4)), drawn((2, 4, 2, 2, 2), (2, 4)))
    found = kinds(draft)
    assert (found["linear"], found["columns"]) == (2, 3)
