"""Token models against MONAI's own networks and VQVAETransformerInferer: logits, samples, likelihoods, codes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate
from monai.inferers import VQVAETransformerInferer
from token_bundles import CODES, DEEP, FLAT, Tiny

import volcast
from volcast.runtime.artifact import read_artifact
from volcast.runtime.token_model import TokenModel
from volcast.runtime.token_sequence import TokenSequence

Pair = tuple[Tiny, TokenModel]


@pytest.fixture(scope="session")
def opened(tiny_tokens: Callable[[Tiny], Path]) -> Callable[[Tiny], TokenModel]:
    def model(tiny: Tiny) -> TokenModel:
        found = volcast.load(tiny_tokens(tiny) / "artifact", engine="onnxruntime", threads=1)
        assert isinstance(found, TokenModel)
        return found

    return model


@pytest.fixture(params=[FLAT, DEEP], ids=["2D", "3D"])
def pair(request: pytest.FixtureRequest, opened: Callable[[Tiny], TokenModel]) -> Pair:
    return request.param, opened(request.param)


def context(tiny: Tiny) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((1, tiny.context_tokens, 8), generator=generator) if tiny.context_tokens else None


def condition(tiny: Tiny) -> dict[str, Any]:
    given = context(tiny)
    return {} if given is None else {"context": given[0].numpy()}


def images(tiny: Tiny, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn((count, 1, *(2 * size for size in tiny.token_shape)), generator=generator)


@pytest.mark.parametrize("blocks", [[1] * 12, [5, 1, 6]], ids=["one by one", "blocks"])
def test_the_logits_of_every_step_are_those_of_monai_over_the_whole_sequence(
    pair: Pair, blocks: list[int]
) -> None:
    tiny, model = pair
    _, transformer = tiny.networks()
    tokens = torch.randint(0, CODES, (2, 12), generator=torch.Generator().manual_seed(0))
    given = context(tiny)
    twice = None if given is None else given.expand(2, -1, -1)
    with torch.no_grad():
        eager = transformer(tokens, context=twice)
        exact = transformer.double()(tokens, context=None if twice is None else twice.double())
    cross = model._prepared(model._conditions(condition(tiny)), 2)
    sequence = TokenSequence(model.spec, model._programs, 2, cross)
    found, first = [], 0
    for size in blocks:
        found.append(sequence.advance(tokens[:, first : first + size].numpy(), first))
        first += size
    assert_as_accurate(torch.from_numpy(np.concatenate(found, 1)), eager, exact)


def test_the_greedy_sample_is_that_of_monais_inferer(pair: Pair) -> None:
    tiny, model = pair
    vqvae, transformer = tiny.networks()
    start = torch.full((1, 1), CODES)
    want = VQVAETransformerInferer().sample(
        tiny.token_shape,
        start,
        vqvae,
        transformer,
        tiny.order(),
        conditioning=context(tiny),
        top_k=1,
        verbose=False,
    )
    volume = model.sample(condition=condition(tiny), top_k=1)
    (code,) = model.tokens(1, condition=condition(tiny), top_k=1)
    assert len(np.unique(code)) > 1, "a constant proves nothing"
    # The same codes, then convolutions of depth 4 and 36..64 products a value: float32 rounding.
    np.testing.assert_allclose(
        volume.array, want[0, 0].numpy(), rtol=0, atol=64 * 2.0**-24 * want.abs().max().item()
    )
    assert volume.report is not None and volume.report.steps == 12


def test_the_likelihood_of_every_token_is_monais(pair: Pair) -> None:
    tiny, model = pair
    vqvae, transformer = tiny.networks()
    given = images(tiny, 2)
    twice = None if (c := context(tiny)) is None else c.expand(2, -1, -1)
    arguments = (given, vqvae, transformer, tiny.order())
    eager = VQVAETransformerInferer().get_likelihood(*arguments, condition=twice)
    indices = vqvae.index_quantize(given)
    found = model.likelihood(given.numpy(), condition=condition(tiny))
    np.testing.assert_array_equal(model.encode(given.numpy()), indices.numpy())
    assert found.shape == (2, *tiny.token_shape) and np.ptp(found) > 1
    # float32 logits of size 10 through 2 layers: MONAI's softmax and log round p itself, to 2^-24 / p at worst.
    allowed = 64 * 2.0**-24 * np.exp(-found.min())
    np.testing.assert_allclose(found, eager.numpy(), rtol=0, atol=allowed)
    # The chain rule: one token changed changes its own likelihood and only those after it in the order.
    order = tiny.order().get_sequence_ordering()
    changed = indices[:1].numpy().reshape(-1).copy()
    changed[order[5]] = (changed[order[5]] + 1) % CODES
    other = model.token_likelihood(changed.reshape(1, *tiny.token_shape), condition=condition(tiny))
    before, after = found[0].reshape(-1)[order], other[0].reshape(-1)[order]
    np.testing.assert_array_equal(before[:5], after[:5])
    assert (before[5:] != after[5:]).all()


def test_decode_is_monais(pair: Pair) -> None:
    tiny, model = pair
    vqvae, _ = tiny.networks()
    indices = torch.randint(0, CODES, (3, *tiny.token_shape), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager, exact = vqvae.decode_samples(indices), vqvae.double().decode_samples(indices)
    assert_as_accurate(torch.from_numpy(model.decode(indices.numpy())), eager, exact)


def test_a_sample_is_the_same_in_any_batch(pair: Pair) -> None:
    tiny, model = pair
    given: dict[str, Any] = {"condition": condition(tiny), "temperature": 1.5, "top_p": 0.95}
    alone = model.tokens(5, 7, batch=1, **given)
    assert len(np.unique(alone.reshape(5, -1), axis=0)) == 5
    np.testing.assert_array_equal(model.tokens(5, 7, batch=4, **given), alone)
    volumes = [volume.array for volume in model.sample_many(2, 7, batch=2, **given)]
    np.testing.assert_array_equal(np.stack(volumes), model.decode(alone[:2])[:, 0])
    assert (model.tokens(1, 8, **given) != alone[:1]).any()


def test_tokens_follow_the_distribution_that_the_logits_say(opened: Callable[[Tiny], TokenModel]) -> None:
    model = opened(FLAT)
    firsts = model.tokens(2000, 3, batch=50).reshape(2000, -1)[:, 0]
    p = np.exp([model.token_likelihood(np.full((1, 4, 3), code))[0, 0, 0] for code in range(CODES)])
    counts = np.bincount(firsts, minlength=CODES)
    # Chi-square of 7 degrees of freedom: above 40.5 once in a million seeds; this one is fixed.
    assert ((counts - 2000 * p) ** 2 / (2000 * p)).sum() < 40.5
    assert p.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0: need a number above 0; for the most probable token"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 9}, "top_k=9: need 1..8"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"steps": 3}, "[sample] unknown setting steps; known: temperature, top_k, top_p"),
        ({"batch": 65}, "batch"),
        ({"batch": 0}, "batch"),
        ({"seed": -1}, "seed=-1"),
        ({"n": 0}, "n=0"),
        ({"condition": {"context": np.zeros((3, 7))}}, "need (3, 8)"),
        ({"condition": {}}, "context is missing"),
    ],
)
def test_bad_requests(opened: Callable[[Tiny], TokenModel], settings: dict[str, Any], words: str) -> None:
    model = opened(DEEP)
    given = {"n": 80, "seed": 0, "batch": 1, "condition": condition(DEEP), **settings}
    with pytest.raises(ValueError) as error:
        model.sample_many(**given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_arrays(opened: Callable[[Tiny], TokenModel]) -> None:
    model = opened(FLAT)
    folder = model._programs._folder
    for call, words in (
        (lambda: model.encode(np.zeros((4, 6))), "need numbers, (N, 1, 8, 6)"),
        (lambda: model.likelihood(np.full((8, 6), np.nan)), "NaN"),
        (lambda: model.decode(np.full((4, 3), 8)), "need 0..7"),
        (lambda: model.decode(np.zeros((4, 3))), "whole numbers"),
        (
            lambda: model.token_likelihood(np.full((4, 3), 8)),
            "[likelihood] indices reach from 8 to 8: need 0..7",
        ),
        (
            lambda: model.token_likelihood(np.zeros((3, 4), np.int64)),
            "[likelihood] got int64 (3, 4): need whole",
        ),
        (lambda: volcast.load(folder, engine="cuda"), "token by token"),
        (lambda: volcast.load(folder, memory_limit="1GiB"), "leave it out"),
        (lambda: read_artifact(folder), "give a diffusion model"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
