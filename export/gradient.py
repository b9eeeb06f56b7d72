"""A classifier's gradient as a program: what guides a diffusion model to a class, without PyTorch where it samples.

`torch.autograd` is run once on symbolic tensors, which leaves forward and backward pass as one graph of aten operators.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional

from volcast.runtime.artifact import MANIFEST, digests, read_artifact
from volcast.runtime.atomic import atomic_folder
from volcast.runtime.spec import ArtifactSpec, Precision, ProgramSpec

from .capture import tidied
from .graph import (
    add_parameter,
    aten,
    count_flops,
    count_nodes,
    fake_mode,
    inputs,
    is_parameter,
    parameter,
    shape_of,
    symbol,
)
from .to_onnx import tensor_specs, to_onnx

PROGRAM = "gradient"


def add_classifier(
    artifact: Path,
    classifier: nn.Module,
    folder: Path,
    *,
    replace: bool = False,
    provenance: Mapping[str, str] = MappingProxyType({}),
) -> ArtifactSpec:
    """A copy of `artifact` in `folder` with the program `gradient` of a classifier; its manifest.

    `classifier(x, timesteps)` gives logits `[N, classes]` for x as noisy as the diffusion model's at timesteps float
    `[N]`: MONAI's DiffusionModelEncoder, trained with the artifact's noise schedule on its latents (times the scale
    factor) or images, of the size `latent_shape`. The program takes `label` int64 `[N]` besides, and gives `gradient`,
    that of log p(label | x) by x, and `log_p` `[N, classes]`. `provenance`: what the manifest says of the classifier.

    Raises:
        ValueError: no artifact of a diffusion model; a classifier for another shape, or with an operator that has no
            ONNX form; a folder that exists (and not `replace`).
    """
    spec = read_artifact(artifact)
    with atomic_folder(folder, replace=replace) as temporary:
        shutil.copytree(artifact, temporary, dirs_exist_ok=True)
        program = write_gradient(classifier, spec.latent_shape, temporary / f"{PROGRAM}.onnx")
        with_gradient = spec.model_copy(
            update={
                "programs": {**spec.programs, PROGRAM: program},
                "files": digests(temporary),
                "provenance": {**spec.provenance, **provenance},
            }
        )
        (temporary / MANIFEST).write_text(with_gradient.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return with_gradient


def write_gradient(classifier: nn.Module, latent_shape: Sequence[int], path: Path) -> ProgramSpec:
    """The program at `path` for x `[N, *latent_shape]`, and its description; see `add_classifier`."""
    graph = capture_gradient(classifier, latent_shape)
    batch = {symbol(shape_of(node)[0]): "batch" for node in inputs(graph).values()}
    described = tensor_specs(graph, batch, ("gradient", "log_p"))
    to_onnx(graph, path, described, precision=Precision.FP32, metadata={})
    example = torch.zeros(1, *latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    nodes, flops = count_nodes(graph), count_flops(graph, example)
    return ProgramSpec(
        file=path.name, inputs=described[0], outputs=described[1], nodes=nodes, nodes_before=nodes, flops=flops,
        flops_before=flops,
    )  # fmt: skip


def capture_gradient(classifier: nn.Module, latent_shape: Sequence[int]) -> GraphModule:
    """`(x, timesteps, label) -> (gradient, log_p)` for x `[N, *latent_shape]`, N free. ValueError: it does not fit."""
    network = copy.deepcopy(classifier).eval().requires_grad_(False)

    def gradient(x: Tensor, timesteps: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        log_p = torch.log_softmax(network(x, timesteps), dim=1)
        wanted = functional.embedding(label, torch.eye(log_p.shape[1], dtype=x.dtype))
        (found,) = torch.autograd.grad(log_p, x, wanted)
        return found, log_p.detach()

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def example(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        free = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (len(sizes) - 1)]
        context: Any = StatelessSymbolicContext(dynamic_sizes=free)
        return mode.from_tensor(torch.zeros(*sizes, dtype=dtype), symbolic_context=context)

    # Equal sizes get one symbol, so all three have one batch.
    examples = example(2, *latent_shape), example(2), example(2, dtype=torch.int64)
    try:
        captured = make_fx(gradient, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*examples)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"[classifier] {type(classifier).__name__} on x {tuple(latent_shape)}: no gradient: {reason}"
        ) from error
    assert isinstance(captured, GraphModule)
    for node in captured.graph.nodes:
        if is_parameter(node):
            node.meta["val"] = fake_mode(captured).from_tensor(parameter(captured, node))
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # copies that made views possible are left out
    return tidied(
        _with_flat_weights(tidied(captured, ("x", "timesteps", "label"))), ("x", "timesteps", "label")
    )


def _with_flat_weights(graph: GraphModule) -> GraphModule:
    """Products with a weight that was repeated for each sample (`bmm(x, expand(w))`) become products with the weight.

    Besides the copies, OpenVINO 2026.4 computes wrong values from them at fixed shapes.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.expand.default or not is_parameter(node.args[0]):
            continue
        weight = node.args[0]
        if len(shape_of(weight)) != 2 or len(shape_of(node)) != 3:
            continue
        for user in list(node.users):
            if user.target is aten.bmm.default and user.args[1] is node:
                user.target, user.args = aten.matmul.default, (user.args[0], weight)
            elif user.target is aten.transpose.int and set(user.args[1:]) == {1, 2}:
                with graph.graph.inserting_before(user):
                    value = parameter(graph, weight).T
                    turned = add_parameter(graph, f"{weight.name}_turned", value)
                for product in list(user.users):
                    if product.target is aten.bmm.default and product.args[1] is user:
                        product.target, product.args = aten.matmul.default, (product.args[0], turned)
    return graph
