"""How much sooner than MONAI's loop is a token model's sample there?

`python -m volcast.benchmarks.tokens BUNDLE CONFIG [THREADS]`

One sample of volcast, and beside some of its tokens, spread evenly, the same token by MONAI: what one turn of
`VQVAETransformerInferer.sample` does, its transformer run again over the sequence so far. MONAI's time of a whole sample
is the mean of these times the tokens (its cost rises smoothly with the length); all its turns take half an hour where
the others' take seconds. Both have the same threads. Seconds of the processor are told beside those of the clock: with
one thread they say what a quiet machine's clock would.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volcast.export.transformer_artifact import export_transformer
from volcast.export.transformer_bundle import TransformerBundle, read_transformer, with_masks
from volcast.runtime.engine_auto import open_engine, physical_cores
from volcast.runtime.token_model import TokenModel

from .bench import environment, summarize

TURNS = 16
"""Tokens that MONAI computes."""
TOP_K = 50


def monai_turn(transformer: torch.nn.Module, tokens: torch.Tensor, bos_token: int) -> torch.Tensor:
    """One turn of MONAI's loop: the next token `[1, 1]` after `tokens` `[1, L]`."""
    with torch.no_grad():
        logits = transformer(x=tokens, context=None)[:, -1, :]
        least, _ = torch.topk(logits, TOP_K)
        logits[logits < least[:, [-1]]] = -float("inf")
        probs = torch.nn.functional.softmax(logits, dim=-1)
        probs[:, bos_token] = 0
        return torch.multinomial(probs, num_samples=1)


def race(
    folder: Path, bundle: TransformerBundle, engine: str, threads: int, turns: int = TURNS
) -> dict[str, Any]:
    """One line of a result: seconds of a sample's loop, the milliseconds of single tokens, and their ratio."""
    spec = export_transformer(bundle, folder / "artifact", replace=True)
    model = TokenModel(folder / "artifact", spec, open_engine(engine, threads))
    transformer = with_masks(bundle.transformer, spec.length)
    torch.set_num_threads(threads)
    code = torch.from_numpy(model.tokens(1, 1, top_k=TOP_K).reshape(1, -1))
    sequence = torch.cat((torch.full((1, 1), spec.bos_token), code[:, list(spec.order) or slice(None)]), 1)
    chosen = {int(place) for place in (np.arange(turns) + 0.5) * spec.length / turns}
    monai_turn(transformer, sequence[:, :1], spec.bos_token)
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    beside: list[tuple[float, float]] = []
    began = now()

    def on_step(done: int, total: int) -> None:
        nonlocal began
        ours.append(since(began))
        if done - 1 in chosen:
            start = now()
            monai_turn(transformer, sequence[:, :done], spec.bos_token)
            theirs.append(since(start))
            beside.append(ours[-1])
        began = now()

    volume = model.sample(1, top_k=TOP_K, on_step=on_step)
    assert volume.report is not None
    line: dict[str, Any] = {
        "tokens": spec.length,
        "engine": engine,
        "threads": threads,
        "monai_turns": len(theirs),
        "decode_s": round(volume.report.decode_seconds, 3),
    }
    for which, clock in enumerate(("clock", "processor")):
        mine, monai = [token[which] for token in ours[1:]], [token[which] for token in theirs]
        line[clock] = {
            "volcast_loop_s": round(sum(mine), 3),
            "volcast_token_ms": round(1e3 * summarize(mine).median, 3),
            "monai_loop_s": round(sum(monai) / len(monai) * spec.length, 1),
            "monai_token_ms": round(1e3 * summarize(monai).median, 2),
            "ratio": round(sum(monai) / sum(token[which] for token in beside), 1),
        }
    return line


def now() -> tuple[float, float]:
    """Seconds of the clock and of this process on its processors."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """How many of both have passed."""
    clock, processor = now()
    return clock - began[0], processor - began[1]


def main(arguments: list[str]) -> None:
    bundle = read_transformer(Path(arguments[0]), config=Path(arguments[1]))
    threads = int(arguments[2]) if len(arguments) > 2 else physical_cores()
    where = environment(threads)
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("onnxruntime", "openvino"):
            line = {"model": bundle.name, **race(Path(folder), bundle, engine, threads), "environment": where}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
