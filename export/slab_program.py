"""A decoder's segments as ONNX programs that take rows and give rows: see `slab_cut`.

A convolution's own padding along the rows is left out: who runs a segment gives it the rows around a slab, zeros outside
the volume. So every slab of a height has one shape, and no row is computed that has to be thrown away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from volcast.runtime.onnx_graph import read_graph
from volcast.runtime.spec import ProgramSpec, SlabNorm, SlabRead, SlabSegment, SlabSpec, SlabValue, TensorSpec

from .slab_cut import Read, Segment, SlabCut
from .slab_rows import GraphRows

FOLDER = "slabs"


def write_slabs(decode: Path, channels: int, axes: int) -> SlabSpec:
    """Cut the decoder in the file `decode`, of latents with `channels` and so many spatial axes, into `slabs/` beside it.

    Raises ValueError for one that cannot be cut.
    """
    cut = SlabCut(GraphRows(read_graph(decode), channels, axes))
    model = onnx.load(decode)
    names = {cut.rows.input: "z"} | {one.target: f"v{number}" for number, one in enumerate(cut.segments)}
    names[cut.rows.output] = "image"
    folder = decode.parent / FOLDER
    folder.mkdir()
    segments = []
    for number, segment in enumerate(cut.segments):
        path = folder / f"{decode.stem}_{number:02d}.onnx"
        segments.append(_Writer(cut, model, segment, names).write(path))
    values = {
        name: SlabValue(channels=cut.channels[value], scale=cut.scales[value])
        for value, name in names.items()
    }
    return SlabSpec(values=values, segments=tuple(segments))


@final
class _Writer:
    """Writes one segment. Volumes that it takes are x0, x1, .., in the order in which its nodes read them."""

    def __init__(self, cut: SlabCut, model: onnx.ModelProto, segment: Segment, names: dict[str, str]) -> None:
        self._cut, self._model, self._segment, self._names = cut, model, segment, names
        self._made = {name: node for node in model.graph.node for name in node.output}
        self._nodes: list[NodeProto] = []
        self._added: dict[str, TensorProto] = {}
        self._inputs: list[TensorSpec] = []
        self._reads: dict[Read, SlabRead] = {}
        self._norms: dict[tuple[str, int, float], SlabNorm] = {}
        self._ones = (1,) * (len(cut.scales[cut.rows.input]) - 1)

    def write(self, path: Path) -> SlabSegment:
        """The file, and its description."""
        cut, segment = self._cut, self._segment
        for place in segment.nodes:
            node = cut.rows.graph.nodes[place]
            proto = NodeProto()
            proto.CopyFrom(self._made[node.outputs[0]])
            for index in range(len(node.inputs)):
                if (place, index) in segment.reads:
                    proto.input[index] = self._read(segment.reads[place, index]).input
            for index, name in enumerate(proto.output):
                proto.output[index] = "y" if name == segment.target else name
            if not segment.whole:
                self._local(proto, place)
            else:
                self._nodes.append(proto)
        outputs = [TensorSpec(name="y", dtype="float32", shape=self._shape(segment.target, "rows"))]
        moments = any(self._is_norm_of(segment.target, one) for one in cut.segments)
        if moments:
            outputs += self._moments()
        self._save(path, outputs)
        program = ProgramSpec(
            file=f"{FOLDER}/{path.name}", inputs=tuple(self._inputs), outputs=tuple(outputs),
            nodes=len(self._nodes), nodes_before=len(segment.nodes), flops=0, flops_before=0,
        )  # fmt: skip
        return SlabSegment(
            program=program, value=self._names[segment.target], reads=tuple(self._reads.values()),
            norms=tuple(self._norms.values()), whole=segment.whole, moments=moments,
        )  # fmt: skip

    def _is_norm_of(self, value: str, segment: Segment) -> bool:
        """Whether a segment that runs in slabs begins with a norm of the value; one that runs whole has its own."""
        nodes = self._cut.rows.graph.nodes
        return not segment.whole and any(
            nodes[place].kind == "GroupNormalization" and read.value == value
            for (place, _), read in segment.reads.items()
        )

    def _read(self, read: Read) -> SlabRead:
        if read not in self._reads:
            number = len(self._reads)
            rows = f"r{number}"
            self._input(f"x{number}", self._shape(read.value, rows))
            if read.masked:
                self._input(f"mask{number}", (1, 1, rows, *self._ones))
            self._reads[read] = SlabRead(
                input=f"x{number}", value=self._names[read.value], before=read.before, after=read.after, edge=read.edge,
                mask=f"mask{number}" if read.masked else None,
            )  # fmt: skip
        return self._reads[read]

    def _input(self, name: str, shape: tuple[int | str, ...]) -> None:
        self._inputs.append(TensorSpec(name=name, dtype="float32", shape=shape))

    def _shape(self, value: str, rows: str) -> tuple[int | str, ...]:
        """`[1, C, rows, ..]`; the other sizes by their axis of the latent and how many times as large they are."""
        scale = self._cut.scales[value]
        return (
            1,
            self._cut.channels[value],
            rows,
            *(f"d{axis + 1}x{times}" for axis, times in enumerate(scale[1:])),
        )

    def _local(self, proto: NodeProto, place: int) -> None:
        node = self._cut.rows.graph.nodes[place]
        window = None if self._cut.rows.constants.issuperset(node.outputs) else self._cut.rows.window(node)
        if node.kind == "GroupNormalization":
            self._norm(proto, self._segment.reads[place, 0])
            return
        self._nodes.append(proto)
        if window is None:
            return
        if node.kind == "Resize":
            self._middle(proto, window.scale * window.before)
            return
        pads = list(node.numbers("pads", ()))
        half = len(pads) // 2
        first = pads[0] + window.scale * window.before if node.kind == "ConvTranspose" else 0
        last = 0
        if node.kind == "ConvTranspose":
            # scale * rows are left of the scale * (rows + before + after - 1) + taps that there are.
            taps = node.numbers("dilations", (1,))[0] * (self._taps(node.inputs[1]) - 1) + 1
            last = window.scale * (window.before + window.after - 1) + taps - first
            extra = list(node.numbers("output_padding", (0,) * half))
            _set(proto, "output_padding", [0, *extra[1:]])
        pads[0], pads[half] = first, last
        _set(proto, "pads", pads)

    def _taps(self, weight: str) -> int:
        return self._cut.rows.values[weight].shape[2]

    def _middle(self, proto: NodeProto, rows: int) -> None:
        """An enlarged slab without what came of the rows around it."""
        if rows:
            name, proto.output[0] = proto.output[0], f"{proto.output[0]}:all"
            bounds = [self._constant(f"slice.{value}", np.array([value])) for value in (rows, -rows, 2)]
            self._emit("Slice", [proto.output[0], *bounds], name)

    def _norm(self, proto: NodeProto, read: Read) -> None:
        """(x - mean) * (weight * inverse) + bias, zero in rows outside the volume."""
        settings = {one.name: helper.get_attribute_value(one) for one in proto.attribute}
        described = self._reads[read]
        key = read.value, int(settings["num_groups"]), float(settings.get("epsilon", 1e-5))
        channels = self._cut.channels[read.value]
        if key not in self._norms:
            number = len(self._norms)
            known = SlabNorm(
                value=described.value,
                groups=key[1],
                epsilon=key[2],
                mean=f"mean{number}",
                inverse=f"inverse{number}",
            )
            for name in (known.mean, known.inverse):
                self._input(name, (1, channels, 1, *self._ones))
            self._norms[key] = known
        norm, (x, weight, bias), result = self._norms[key], proto.input, proto.output[0]
        shape = self._constant("channels", np.array([1, channels, 1, *self._ones]))
        scale = self._emit(
            "Mul",
            [self._emit("Reshape", [weight, shape], f"{result}:weight"), norm.inverse],
            f"{result}:scale",
        )
        offset = self._emit("Reshape", [bias, shape], f"{result}:bias")
        if described.mask is not None:
            scale = self._emit("Mul", [scale, described.mask], f"{result}:scale_rows")
            offset = self._emit("Mul", [offset, described.mask], f"{result}:bias_rows")
        centred = self._emit("Sub", [x, norm.mean], f"{result}:centred")
        self._emit("Add", [self._emit("Mul", [centred, scale], f"{result}:scaled"), offset], result)

    def _moments(self) -> list[TensorSpec]:
        """Mean and variance of every row: the variance about the row's own mean, so that a large one costs no digits."""
        axes = self._constant("within", np.arange(3, 3 + len(self._ones)))
        self._emit("ReduceMean", ["y", axes], "mean", keepdims=1)
        apart = self._emit("Sub", ["y", "mean"], "apart")
        self._emit("ReduceMean", [self._emit("Mul", [apart, apart], "squared"), axes], "variance", keepdims=1)
        shape: tuple[int | str, ...] = (1, self._cut.channels[self._segment.target], "rows", *self._ones)
        return [TensorSpec(name=name, dtype="float32", shape=shape) for name in ("mean", "variance")]

    def _constant(self, name: str, value: Any) -> str:
        self._added[f"slab.{name}"] = numpy_helper.from_array(value.astype(np.int64), f"slab.{name}")
        return f"slab.{name}"

    def _emit(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _save(self, path: Path, outputs: list[TensorSpec]) -> None:
        read = {name for node in self._nodes for name in node.input}
        weights = [one for one in self._model.graph.initializer if one.name in read]
        graph = helper.make_graph(
            self._nodes, "volcast", list(map(_described, self._inputs)), list(map(_described, outputs)),
            [*weights, *self._added.values()],
        )  # fmt: skip
        opsets = [helper.make_opsetid(one.domain, one.version) for one in self._model.opset_import]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=self._model.ir_version, producer_name="volcast"
        )
        model.metadata_props.extend(self._model.metadata_props)
        onnx.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)


def _set(node: NodeProto, name: str, value: list[int]) -> None:
    kept = [one for one in node.attribute if one.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _described(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.shape))
