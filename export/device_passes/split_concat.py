"""split_concat: a product with a concatenation is the sum of two products, and the concatenation is never written.

    cat([a, b]) @ W + bias  =  b @ W[Ca:] + (a @ W[:Ca] + bias)

The first product has the bias (and a residual where there was one), the second adds the first as its residual. Where
anything but products reads the concatenation it is written all the same, so one product stays. Exact up to the order
of the sum over channels.
"""

from __future__ import annotations

from torch import Tensor

from volcast.export.draft import Draft
from volcast.runtime.device.program import Operation

from .patterns import channel_axis, concat_parts, example_shapes, is_strided, reads_at


def split_concat(draft: Draft) -> Draft:
    """Every concatenation of two that only products read is replaced by its parts."""
    shapes = example_shapes(draft)
    for whole in [one.outputs[0] for one in draft.operations if one.kind == "concat"]:
        parts = concat_parts(draft, whole, shapes)
        readers = draft.consumers.get(whole, ())
        if parts is None or any(one.kind != "linear" or reads_at(one, whole) != [0] for one in readers):
            continue
        if any(
            is_strided(draft, part) or one.inputs[1] not in draft.weights for part in parts for one in readers
        ):
            continue
        weights = dict[str, Tensor]()
        operations = list[Operation]()
        for one in draft.operations:
            if one not in readers:
                operations.append(one)
                continue
            name = one.outputs[0]
            weight = draft.weights[one.inputs[1] or ""]
            channels = shapes[parts[0]][channel_axis(shapes[parts[0]])]
            weights |= {
                f"{name}.first": weight[:channels].clone(),
                f"{name}.second": weight[channels:].clone(),
            }
            made = (parts[0], f"{name}.first", *one.inputs[2:])
            operations.append(Operation(kind="linear", inputs=made, outputs=(f"{name}.part",)))
            rest = (parts[1], f"{name}.second", None, f"{name}.part")
            operations.append(Operation(kind="linear", inputs=rest, outputs=one.outputs))
        draft = draft.edited(operations, weights)
    return draft
