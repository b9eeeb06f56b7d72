"""lower: an ONNX program of an artifact as a draft of a device program, operator by operator."""

from __future__ import annotations

from pathlib import Path

import onnx

from .draft import Draft
from .lower_operators import OPERATORS
from .lowering import Lowering, refused


def lower(path: Path) -> Draft:
    """The ONNX file `path` (step, decode or encode) as raw operations; weights float32, sizes free.

    Equal operations are made once, the bias of a product is part of it. Raises ValueError, naming the operator, for
    what no device operation does.
    """
    model = onnx.load(path)
    lowering = Lowering(model.graph)
    for node in model.graph.node:
        if node.op_type not in OPERATORS:
            raise refused(node, "this operator has none")
        OPERATORS[node.op_type](lowering, node)
    return lowering.draft()
