"""A request's body: bounded before it is parsed, typed by the artifact's inputs, checked by what `Model.submit` checks."""

from __future__ import annotations

import json
import math
import re
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from volcast.runtime.asked import Asked, read_request
from volcast.runtime.conditions import resolve
from volcast.runtime.frame import place_of
from volcast.runtime.generator_model import check_style
from volcast.runtime.generator_spec import GeneratorSpec
from volcast.runtime.image_start import painted
from volcast.runtime.interface import NEGATIVE, Array, as_bytes, inputs
from volcast.runtime.job import Job, make_job
from volcast.runtime.low_res import low_res_size, with_channels
from volcast.runtime.request import make_request
from volcast.runtime.sizes import default_sizes, volume_channels, volume_shape
from volcast.runtime.spec import ArtifactSpec, Manifest
from volcast.runtime.token_spec import TokenSpec
from volcast.runtime.volume import Volume

from .files import Files
from .refusal import Refusal
from .schema import Inpainting
from .settings import Limits
from .shapes import image_latent, takes_file, takes_image

DEPTH, DIGITS = 8, 64
"""Of brackets inside brackets: the body, `condition` and an array of five axes are seven. Of a number's letters."""
# The closing quote is optional, so that the search takes one pass also over what is no JSON.
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_LONG = re.compile(rb"[0-9eE.+-]{%d}" % (DIGITS + 1))
_FILE = re.compile(rb'"[A-Za-z0-9+/=\\]{4096,}"')
_DECIMAL = re.compile(r"[0-9]{1,20}")


COPIES = 3
"""Of a request's tensors in memory: they, their message and its bytes on the way to the server. The latter two go once they
are sent, and come again where another server takes its place."""


@final
@dataclass(frozen=True, kw_only=True)
class Place:
    """Where volumes lie, as `Volume` says it."""

    affine: NDArray[np.float64]
    spacing_mm: tuple[float, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Order:
    """A request that the server will take.

    Attributes:
        tensors: what it is sent.
        seed: as in `Model.sample_many`.
        volumes: how many are answered.
        steps: calls of the network.
        shape: the spatial shape of each volume.
        place: of the image or label map that the volumes lie where; the server answers with bare numbers then. Or None.
    """

    tensors: Mapping[str, Array]
    seed: int
    volumes: int
    steps: int
    shape: tuple[int, ...]
    place: Place | None

    @property
    def bytes(self) -> int:
        """What it holds at most."""
        return COPIES * sum(tensor.nbytes for tensor in self.tensors.values())


@final
class BodyReader:
    """Reads bodies for one artifact. Safe to use from any thread."""

    def __init__(self, spec: Manifest, schema: type[BaseModel], limits: Limits) -> None:
        self._spec, self._schema, self._limits = spec, schema, limits
        self._inputs = {tensor.name: tensor for tensor in inputs(spec)}
        self._files = Files(spec, limits.voxels)

    @property
    def most_bytes(self) -> int:
        """Of a body."""
        spec, limits = self._spec, self._limits
        files = takes_image(spec) or any(takes_file(spec, one) for one in spec.conditions)
        return limits.file_bytes if files else limits.body_bytes

    def read(self, content: bytes) -> Order:
        """Raises `Refusal`: anything that the server would refuse, in volcast's words, or that is beyond a limit."""
        rest, most = len(content), self._limits.body_bytes
        if rest > most:  # values take many times the memory of their text, files do not
            rest -= sum(found.end() - found.start() for found in _FILE.finditer(content))
        if rest > most:
            raise Refusal("too_large", f"[request] the body without its files: need {most} bytes or fewer")
        try:
            return self._order(self._typed(parse_json(content)))
        except ValueError as error:
            text = " ".join(str(error).split()).replace("[request] inpaint_", "[request] inpaint.", 1)
            raise Refusal("invalid", text) from error

    def _typed(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise ValueError('[request] the body is no JSON object; write {"steps": 25}')  # noqa: TRY004  (of the request)
        # Not left to pydantic, which tells no place of a name that is no UTF-8.
        for name in given:
            if name not in self._schema.model_fields:
                known = ", ".join(self._schema.model_fields)
                raise ValueError(f"[request] unknown field {reprlib.repr(name)}; known: {known}")
        try:
            return self._schema.model_validate(given).model_dump(exclude_none=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name, *inside = first["loc"]
            if name == "inpaint" and inside:
                raise ValueError(_painting(str(inside[0]), given[name])) from error
            need = self._schema.model_fields[str(name)].description
            raise ValueError(f"[request] {name}={reprlib.repr(given[str(name)])}: need {need}") from error

    def _order(self, body: dict[str, Any]) -> Order:
        condition, negative = (
            self._files.conditions(part, body.pop(part, {})) for part in ("condition", "negative")
        )
        image = self._files.image(body.pop("image", None))
        spec = self._spec
        # The image of a one-pass model lends its style, and not its place.
        lies = place_of(spec, "request", image if isinstance(spec, ArtifactSpec) else None, [condition])
        if isinstance(spec, ArtifactSpec) and spec.low_res is not None:
            condition, negative = (dict(with_channels(spec, one)) for one in (condition, negative))
        inpaint = body.pop("inpaint", {})
        mask = self._files.mask(inpaint.pop("mask")) if inpaint else None
        body |= {f"inpaint_{name}": int(value) for name, value in inpaint.items()}
        seed = self._seed(body.pop("seed", None))
        tensors = {name: self._tensor(name, value) for name, value in body.items()}
        place = None if lies is None else Place(affine=lies.affine, spacing_mm=lies.spacing_mm)
        form = "nifti" if place is None else "float32"
        tensors |= {"seed": np.array([seed], np.uint64), "output_format": as_bytes(form)}
        if mask is not None:
            tensors["inpaint_mask"] = mask.array
        asked = read_request(spec, tensors)
        if isinstance(spec, ArtifactSpec):
            shape, steps = self._denoised(spec, asked, seed, condition, negative, image, mask)
        else:
            shape, steps = self._made(spec, asked, condition, image)
        tensors |= self._conditions(condition) | self._conditions(negative, NEGATIVE)
        if image is not None:
            tensors["image"] = image.array
        return Order(tensors=tensors, seed=seed, volumes=asked.volumes, steps=steps, shape=shape, place=place)

    def _denoised(
        self, spec: ArtifactSpec, asked: Asked, seed: int, condition: Mapping[str, Any], negative: Mapping[str, Any],
        image: Volume | None, mask: Volume | None,
    ) -> tuple[tuple[int, ...], int]:  # fmt: skip
        """The shape of a diffusion model's volumes, and the calls of the network for each."""
        request = make_request(spec, seed, asked.settings)
        size: Sequence[int] | None = self._size(spec, image, asked, request.strength)
        if spec.low_res is not None and size is None:
            size = low_res_size(spec, condition)
        shape = volume_shape(spec, size, "request")
        self._check_bytes(shape, asked)
        job = make_job(spec, request, asked.samples, 1, condition, size, negative, asked.weights)
        if asked.inpaint is not None and mask is not None:
            # What the latent holds does not matter to the checks.
            job, _ = painted(job, replace(asked.inpaint, mask=mask), image, np.zeros(job.shape, np.float32))
        self._check_previews(job, asked)
        return shape, len(job.plan)

    def _made(
        self, spec: Manifest, asked: Asked, condition: Mapping[str, Any], image: Volume | None
    ) -> tuple[tuple[int, ...], int]:
        """The shape of a token or one-pass model's volumes, and the calls of the network for each."""
        shape = volume_shape(spec)
        self._check_bytes(shape, asked)
        resolve(spec, condition, default_sizes(spec))
        if image is not None and isinstance(spec, GeneratorSpec):
            check_style(spec, image)
        return shape, spec.length if isinstance(spec, TokenSpec) else 1

    def _size(
        self, spec: ArtifactSpec, image: Volume | None, asked: Asked, strength: float
    ) -> tuple[int, ...] | None:
        given = asked.size
        if image is None:
            if asked.inpaint is not None:
                raise ValueError("[request] inpaint without an image: give the image that its mask is of")
            if strength != 1:
                raise ValueError(
                    f"[request] strength={strength:g} without an image: give one, or leave it out"
                )
            return given
        found = image_latent(spec, image.array.shape)
        if given is not None and given != found:
            raise ValueError(
                f"[request] size={list(given)}: the image's latent is {list(found)}; leave size out"
            )
        return found

    def _seed(self, given: int | str | None) -> int:
        if given is None:
            return secrets.randbits(64)
        if isinstance(given, str) and not _DECIMAL.fullmatch(given) or not 0 <= int(given) < 2**64:
            raise ValueError(f"[request] seed={reprlib.repr(given)}: need 0..{2**64 - 1}")
        return int(given)

    def _tensor(self, name: str, value: Any) -> Array:
        if isinstance(value, str):
            return as_bytes(value)
        try:
            with np.errstate(over="ignore"):
                return np.array(value if isinstance(value, list) else [value], self._inputs[name].dtype)
        except OverflowError as error:
            raise ValueError(f"[request] {name}={reprlib.repr(value)}: need {self._inputs[name].text}") from error  # fmt: skip

    def _conditions(self, given: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
        """What `make_job` has found good, as tensors."""
        found = {}
        for name, value in given.items():
            array = np.asarray(value).astype(self._inputs[name].dtype)
            found[prefix + name] = array if array.ndim else array.reshape(1)
        return found

    def _check_bytes(self, shape: tuple[int, ...], asked: Asked) -> None:
        voxels, most = math.prod(shape) * volume_channels(self._spec), self._limits.voxels
        if voxels > most:
            raise Refusal("too_large", f"[request] size: volumes of {_times(shape)} = {voxels} voxels; this server makes up to {most}")  # fmt: skip
        # float32, a hundredth for what gzip adds to noise, and a header.
        if asked.volumes * (4.04 * voxels + 1024) > self._limits.store_bytes:
            raise Refusal("too_large", f"[request] num_samples={asked.samples}: {asked.volumes} volumes of {_times(shape)} are more than this server keeps at once; ask for fewer")  # fmt: skip

    def _check_previews(self, job: Job, asked: Asked) -> None:
        most, every, volumes = self._limits.previews, asked.preview_every, asked.volumes
        if every and len(job.plan) // every * volumes > most:
            least = -(-len(job.plan) * volumes // most)
            raise ValueError(
                f"[request] preview_every={every}: more than {most} previews; need {least} or more"
            )


def _painting(name: str, given: Mapping[str, Any]) -> str:
    """Why the field `name` of `inpaint` is refused."""
    fields = Inpainting.model_fields
    if name not in fields:
        return f"[request] unknown field inpaint.{reprlib.repr(name)[1:-1]}; known: {', '.join(fields)}"
    need = fields[name].description
    if name not in given:
        return f"[request] inpaint without {name}: need {need}"
    return f"[request] inpaint.{name}={reprlib.repr(given[name])}: need {need}"


def parse_json(content: bytes) -> Any:
    """The value in `content`; nothing: an empty object. Raises ValueError, before it parses: too deep, a number too long."""
    if not content:
        return {}
    bare = _TEXT.sub(b"", content)
    marks = np.frombuffer(bare, np.uint8)
    steps = np.isin(marks, (91, 123)).astype(np.int8) - np.isin(marks, (93, 125)).astype(np.int8)
    depth = int(np.cumsum(steps, dtype=np.int32).max(initial=0))
    if depth > DEPTH:
        raise ValueError(f"[request] brackets {depth} deep: need {DEPTH} or fewer")
    if _LONG.search(bare):
        raise ValueError(f"[request] a number of more than {DIGITS} letters: write it shorter")
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError("[request] the body is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"[request] the body is no JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"[request] {name} is no JSON: need finite numbers")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("[request] a name is given twice in one object: give it once")
    return found


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)
