"""A module's request: from whatever TorchServe hands over to one tensor an input, every limit
checked once.

The body is JSON, an .npy file, a safetensors file, an image or text, by its Content-Type or else by
its first bytes; or every input comes by its own name (a multipart form, gRPC's input map). Each
refusal names the input; trouble with the body as a whole is laid at `body`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from preheat.config.module import InputConfig, ModuleLimits
from preheat.errors import RequestError, is_panic
from preheat.models.module import tensors
from preheat.protocol.fields import envelope, together, unknown
from preheat.protocol.json_text import decoded, document, from_base64, in_bytes

Kind = Literal["json", "npy", "safetensors", "image", "text"]
Accept = Literal["application/json", "application/x-npy", "application/safetensors"]

_FORMS: Mapping[Accept, tuple[Kind, tuple[str, ...]]] = {
    "application/json": ("json", ()),
    "application/x-npy": ("npy", ("application/npy",)),
    "application/safetensors": (
        "safetensors",
        ("application/x-safetensors", "application/vnd.safetensors"),
    ),
}
"""The content types that tensors are answered in, and others that they are known by."""
_KINDS: Mapping[str, Kind] = {
    alias: kind for form, (kind, others) in _FORMS.items() for alias in (form, *others)
}
_ACCEPTED: Mapping[str, Accept] = {
    "application/*": "application/json",
    "*/*": "application/json",
    **{alias: form for form, (_, others) in _FORMS.items() for alias in (form, *others)},
}
_SEND = "send tensors as JSON, .npy or safetensors, with their Content-Type"
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
TEXT, ACCEPT, INPUTS = "text", "accept", "inputs"


class Tokenizer(Protocol):
    """The folder's own; see `transformers.PreTrainedTokenizerBase.__call__`."""

    def __call__(self, text: str, *, return_tensors: str) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the requests of one module.

    Args:
        specs: its inputs; None where the YAML declares none: then tensors are taken as they come,
            for the arguments `names`.
        bounds: how large an input may be.
        computed: the module's dtype.
        ranges: the least and the greatest number of an input.
        tokenizer: None where its folder has none.
    """

    names: Sequence[str]
    specs: Mapping[str, InputConfig] | None
    limits: ModuleLimits
    bounds: tensors.Bounds
    computed: torch.dtype
    ranges: Mapping[str, tensors.Span]
    tokenizer: Tokenizer | None = None

    def read(
        self, row: object, headers: Mapping[str, str]
    ) -> tuple[dict[str, torch.Tensor], Accept]:
        """The request's tensors by input, each with a batch dimension of 1, and the form of the
        answer.

        Raises:
            RequestError: anything that is not a legal request; nothing else is raised, whatever the
                row holds.
        """
        body, parts = envelope(row, self.names, hint=_SEND)
        accept = _accepted(parts.pop(ACCEPT, None), headers.get("accept"))
        inside = self._of_body(in_bytes(body), headers.get("content-type"))
        return self._tensors(together(inside, parts, "body")), accept

    def _of_body(self, body: object, content_type: str | None) -> Mapping[str, object]:
        """What the body holds by input name."""
        if isinstance(body, bytes):
            kind = _kind_by_type(content_type) or _kind_by_content(body)
            if kind == "json":
                return self._of_json(self._json(body, "body"))
            if kind == "safetensors":
                return tensors.from_safetensors(body)
            if kind == "text":
                return {TEXT: decoded(body, TEXT)}
            return {self._only(images=kind == "image"): body}
        return self._of_json(body)

    def _of_json(self, body: object) -> Mapping[str, object]:
        if isinstance(body, Mapping) and INPUTS in body and INPUTS not in self.names:
            unknown = set(body) - {INPUTS}
            if unknown:
                raise self._unknown(min(map(str, unknown)))
            body = body[INPUTS]
        if isinstance(body, Mapping):
            return body
        if body is None or isinstance(body, str):
            raise RequestError("must be a JSON object of inputs, or a list", "body")
        return {self._only(images=False): body}

    def _json(self, data: bytes, name: str) -> object:
        """The JSON in `data`, which is counted first: lists of lists take a tenth of a second a
        megabyte to read.
        """
        most = self._most_numbers()
        if data.count(b",") > most + self.limits.max_text_chars:
            raise RequestError(f"holds more numbers than the {most} that this model can take", name)
        return document(data, name)

    def _most_numbers(self) -> int:
        """Of all inputs together, and some."""
        if self.specs is None:
            return len(self.names) * self.bounds.max_elements
        return sum(self.bounds.most(spec) for spec in self.specs.values())

    def _only(self, *, images: bool) -> str:
        """The input that is meant where a body names none."""
        if self.specs is None:
            chosen = list(self.names)
        elif images:
            chosen = [name for name, spec in self.specs.items() if spec.takes_images]
        else:
            chosen = [name for name, spec in self.specs.items() if spec.default is None]
        if len(chosen) != 1:
            what = "images" if images else "inputs"
            found = ", ".join(chosen) or "none"
            raise RequestError(f"names no input, and this model's {what} are: {found}", "body")
        return chosen[0]

    def _tensors(self, sent: dict[str, object]) -> dict[str, torch.Tensor]:
        if TEXT in sent and TEXT not in self.names:
            sent |= self._tokenized(sent.pop(TEXT), sent)
        for name in sent:
            if name not in self.names:
                raise self._unknown(name)
        if self.specs is None:
            if not sent:
                raise RequestError(
                    f"holds no input; this model takes {', '.join(self.names)}", "body"
                )
            return {
                name: self._input(sent[name], None, name) for name in self.names if name in sent
            }
        found = {
            name: self._input(sent[name], spec, name)
            for name, spec in self.specs.items()
            if sent.get(name) is not None
        }
        return self._completed(found)

    def _input(self, value: object, spec: InputConfig | None, name: str) -> torch.Tensor:
        tensor = self._decoded(value, spec, name)
        if spec is None:
            tensor = tensors.as_sent(tensor, name, self.bounds)
        else:
            tensor = tensors.checked(tensor, spec, name, self.bounds)
        # A mask of an undeclared input may be of floats that are added, such as 0 and -10000.
        added = spec is None and tensor.is_floating_point()
        span = None if added else self.ranges.get(name)
        tensors.check_values(tensor, name, self.computed, span)
        return tensor

    def _decoded(self, value: object, spec: InputConfig | None, name: str) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, str):
            value = _image(value, name, self.limits)
        if isinstance(value, bytes):
            if value.startswith(tensors.NPY_MAGIC):
                return tensors.from_npy(value, name)
            if value.startswith(_IMAGES):
                if spec is None or not spec.takes_images:
                    raise RequestError("takes no image", name)
                return tensors.from_image(value, spec, name, self.limits, self.bounds)
            _refuse_pickle(value, name)
            value = self._json(value, name)
        # before a tensor, which takes seconds where it is large, is made of it
        if isinstance(value, list):
            shape = tensors.shape_of(value, name)
            if spec is None:
                self.bounds.check(shape, None, name)
            else:
                tensors.check_shape(shape, spec, name, self.bounds)
        return tensors.from_list(value, spec.dtype if spec else None, name)

    def _tokenized(self, text: object, beside: Mapping[str, object]) -> dict[str, torch.Tensor]:
        if self.tokenizer is None:
            raise RequestError("is not taken: this model has no tokenizer", TEXT)
        if isinstance(text, bytes):
            text = decoded(text, TEXT)
        if not isinstance(text, str):
            raise RequestError("must be text, one request each", TEXT)
        if len(text) > self.limits.max_text_chars:
            raise RequestError(
                f"has {len(text)} characters, at most {self.limits.max_text_chars} are allowed",
                TEXT,
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise RequestError("holds half a surrogate pair, which is no text", TEXT)
        try:
            encoded = self.tokenizer(text, return_tensors="pt")
        # a folder's tokenizer may be anybody's code, and fail on a text in any way
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise RequestError(f"cannot be tokenized: {type(error).__name__}", TEXT) from None
        found = {name: tensor for name, tensor in encoded.items() if name in self.names}
        twice = next((name for name in found if beside.get(name) is not None), None)
        if twice is not None:
            raise RequestError("is given beside text, which fills it", twice)
        return found

    def _completed(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With what was left out: inputs with a default, in the size that the others have; in the
        order of the YAML.
        """
        assert self.specs is not None
        sizes = sizes_of(found, self.specs)
        complete: dict[str, torch.Tensor] = {}
        for name, spec in self.specs.items():
            if name in found:
                complete[name] = found[name]
                continue
            if spec.default is None:
                raise RequestError("is missing", name)
            unknown = next(
                (
                    extent
                    for extent in spec.shape[1:]
                    if isinstance(extent, str) and extent not in sizes
                ),
                None,
            )
            if unknown is not None:
                raise RequestError(f"is missing, and no other input says its {unknown}", name)
            shape = spec.row_shape(sizes)
            self.bounds.check(shape, spec, name)
            complete[name] = torch.full(shape, spec.default, dtype=tensors.TORCH_DTYPES[spec.dtype])
        return complete

    def _unknown(self, name: object) -> RequestError:
        return unknown(name, [*self.names, *([TEXT] if self.tokenizer else [])], "input", "known:")


def sizes_of(found: Mapping[str, torch.Tensor], specs: Mapping[str, InputConfig]) -> dict[str, int]:
    """The size of each named dimension.

    Raises:
        RequestError: two inputs disagree.
    """
    sizes: dict[str, int] = {}
    for name, tensor in found.items():
        for extent, size in zip(specs[name].shape[1:], tensor.shape[1:], strict=True):
            if isinstance(extent, str) and sizes.setdefault(extent, size) != size:
                raise RequestError(f"has {extent} {size}, another input has {sizes[extent]}", name)
    return sizes


def _accepted(part: object, header: str | None) -> Accept:
    """The first of the client's wishes that can be met; its order counts, not its weights."""
    text = decoded(part, ACCEPT) if isinstance(part, bytes) else header
    if text is None or not text.strip():
        return "application/json"
    for wish in text.split(","):
        accept = _ACCEPTED.get(wish.partition(";")[0].strip().lower())
        if accept is not None:
            return accept
    known = ", ".join(sorted(set(_ACCEPTED.values())))
    raise RequestError(f"must be one of {known}", ACCEPT, code=406)


def _kind_by_type(content_type: str | None) -> Kind | None:
    mime = (content_type or "").partition(";")[0].strip().lower()
    if mime.startswith("image/"):
        return "image"
    if mime.startswith("text/"):
        return "text"
    return _KINDS.get(mime)


def _kind_by_content(data: bytes) -> Kind:
    if data.startswith(tensors.NPY_MAGIC):
        return "npy"
    if data.startswith(_IMAGES):
        return "image"
    if data.lstrip()[:1] in (b"{", b"[") or not data:
        return "json"
    if tensors.looks_like_safetensors(data):
        return "safetensors"
    _refuse_pickle(data, "body")
    raise RequestError(
        "is not recognised; send JSON, .npy, safetensors, an image or text, and its Content-Type",
        "body",
    )


def _refuse_pickle(data: bytes, name: str) -> None:
    if data.startswith(_PICKLES):
        raise RequestError(
            "is a pickle or a zip archive (such as .npz), which is refused: reading it can run "
            "code; send safetensors",
            name,
        )


def _image(text: str, name: str, limits: ModuleLimits) -> bytes:
    """An image in JSON."""
    refusal = "must be lists of numbers, or an image in base64"
    data = from_base64(text, name, limits.max_image_bytes, refusal=refusal)
    if not data.startswith(_IMAGES):
        raise RequestError(refusal, name)
    return data
