"""What honest, careless and hostile clients send: hypothesis strategies for whole requests, over
REST and gRPC.

The legal ones fit every model that covers 64x64 pixels and guides on demand; what each request may
be answered with stands beside it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from preheat.models.diffusion.request import FIELDS

Protocol = Literal["rest", "grpc", "grpc-stream"]
Headers = tuple[tuple[bytes, bytes], ...]
MAX_SIDE, MAX_STEPS = 64, 2
BOUNDARY = b"fuzz"
JSON_HEADER: Headers = ((b"Content-Type", b"application/json"),)


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as it goes over the wire."""

    kind: str
    """For the tally."""
    protocol: Protocol = "rest"
    content: bytes = b""
    """The body, over REST."""
    headers: Headers = ()
    fields: Mapping[str, bytes] = field(default_factory=dict)
    """The input map, over gRPC."""
    expect: Literal["picture", "refusal", "either"] = "either"
    at_fault: str | None = None
    """The field that the refusal must name; where TorchServe could not parse the body, `body` will
    do.
    """
    size: tuple[int, int] | None = None
    """Of the picture: (height, width) in pixels."""
    leaves: bool = False
    """Whether the client hears the first part of the answer and goes."""

    @property
    def num_bytes(self) -> int:
        return len(self.content) + sum(
            len(name) + len(value) for name, value in self.fields.items()
        )

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


def sent() -> SearchStrategy[Sent]:
    """Any request: a third is legal, a third is wrong in one place, a third is whatever comes."""
    return st.one_of(legal(), nearly_legal(), hostile())


def legal() -> SearchStrategy[Sent]:
    return st.one_of(
        payloads().flatmap(lambda one: _json_sent("legal JSON", one, "picture")),
        payloads().flatmap(_map_sent),
        st.builds(_multipart_legal, payloads(), st.randoms(use_true_random=False)),
        st.builds(_text_sent, st.text(_CHARS, min_size=1, max_size=60)),
        payloads().flatmap(_left),
    )


def _left(payload: Mapping[str, Any]) -> SearchStrategy[Sent]:
    """A stream whose client does not stay."""
    body = _dumped({**payload, "stream": True})
    return st.sampled_from(
        [
            Sent("left early", content=body, headers=JSON_HEADER, leaves=True),
            Sent("left early", protocol="grpc-stream", fields={"data": body}, leaves=True),
        ]
    )


def nearly_legal() -> SearchStrategy[Sent]:
    """A legal request with one value that is not."""
    return payloads().flatmap(
        lambda payload: st.sampled_from(sorted(ILLEGAL)).flatmap(
            lambda name: ILLEGAL[name].flatmap(
                lambda value: _json_sent(
                    "nearly legal JSON", _spoilt(payload, name, value), "refusal", name
                )
            )
        )
    )


def _spoilt(payload: Mapping[str, Any], name: str, value: object) -> dict[str, Any]:
    # An image that is read at all must not meet a strength that leaves it no step.
    return {**payload, **({"strength": 1.0} if name == "image" else {}), name: value}


def hostile() -> SearchStrategy[Sent]:
    return st.one_of(
        _bodies("any JSON", _any_json().map(_dumped)),
        _bodies(
            "broken JSON",
            st.builds(_broken, payloads().map(_dumped), st.randoms(use_true_random=False)),
        ),
        _bodies("monstrous JSON", st.sampled_from(MONSTERS).map(lambda make: make())),
        _bodies("any bytes", st.binary(max_size=200)),
        _bodies(
            "any text",
            st.text(max_size=100).map(lambda text: text.encode("utf-16", "surrogatepass")),
        ),
        _bodies("form", payloads().map(lambda one: urlencode(one).encode()), _FORM_TYPES),
        _bodies("multipart", _parts().flatmap(_multipart_hostile), _MULTIPART_TYPES),
        _maps(),
    )


def payloads() -> SearchStrategy[dict[str, Any]]:
    """Legal requests as JSON objects; every size is named and small."""
    return st.builds(_agreeing, _plain(), st.sampled_from(TASKS), _pictures("RGB"), _pictures("L"))


TASKS = ("text", "text", "text", "image", "inpainting")
_CHARS = st.characters(codec="utf-8", exclude_characters="\0")
_SIDES = st.integers(16, MAX_SIDE)


def _plain() -> SearchStrategy[dict[str, Any]]:
    prompts = st.one_of(
        st.text(_CHARS, max_size=60), st.integers(0, 390).map(lambda n: "word " * n)
    )
    return st.fixed_dictionaries(
        {
            "prompt": prompts,
            "height": _SIDES,
            "width": _SIDES,
            "num_inference_steps": st.integers(1, MAX_STEPS),
        },
        optional={
            "negative_prompt": st.none() | st.text(_CHARS, max_size=30),
            "guidance_scale": st.floats(0, 50) | st.integers(0, 50) | st.none(),
            "seed": st.integers(0, 2**63 - 1) | st.none(),
            "strength": st.floats(0.5, 1),
            "num_images": st.integers(1, 2),
            "output_format": st.sampled_from(["png", "jpeg", "webp"]) | st.none(),
            "response_format": st.sampled_from(["image", "b64_json"]) | st.none(),
            "stream": st.booleans() | st.none(),
            "preview_every": st.integers(0, 3) | st.none(),
            "num_previews": st.integers(0, 3) | st.none(),
            "output_compression": st.integers(0, 100) | st.none(),
        },
    )


def _agreeing(payload: dict[str, Any], task: str, image: bytes, mask: bytes) -> dict[str, Any]:
    """The payload with what its fields ask of each other put right."""
    payload = dict(payload)
    if not payload.get("stream"):
        payload.pop("preview_every", None)
        payload.pop("num_previews", None)
        if payload.get("num_images") == 2:
            payload["response_format"] = "b64_json"
    if payload.get("preview_every"):
        payload.pop("num_previews", None)
    if payload.get("output_format") in (None, "png"):
        payload.pop("output_compression", None)
    if task == "text":
        return payload
    payload["image"] = base64.b64encode(image).decode()
    if payload["num_inference_steps"] == 1 or "strength" not in payload:
        payload["strength"] = 1.0  # less would leave no step to run
    if task == "inpainting":
        payload["mask_image"] = base64.b64encode(mask).decode()
    return payload


def _encoded(mode: str, height: int, width: int, file_format: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(height * width).integers(
        0, 255, (height, width, 3), dtype=np.uint8
    )
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded("RGB", 40, 20, "JPEG", exif=exif.tobytes())


GOOD_IMAGES = (
    _encoded("RGB", 24, 30, "PNG"),
    _encoded("RGBA", 20, 17, "PNG"),
    _encoded("P", 16, 16, "GIF"),
    _encoded("L", 33, 70, "JPEG"),
    _encoded("CMYK", 20, 20, "JPEG"),
    _encoded("I;16", 20, 20, "PNG"),
    _encoded("1", 9, 9, "BMP"),
    _encoded("RGB", 40, 40, "WEBP"),
    _encoded("RGB", 1, 1, "TIFF"),
    _encoded("LA", 1, 90, "PNG"),
    _turned(),
)


def _pictures(mode: str) -> SearchStrategy[bytes]:
    return st.sampled_from(GOOD_IMAGES if mode == "RGB" else GOOD_IMAGES[:4])


def _no_image(data: bytes) -> str:
    return base64.b64encode(data).decode()


_BAD_IMAGES: SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [
            "",
            "not base64!",
            "data:image/png;base64,",
            "a",
            "====",
            "\u00e9",
            [],
            {},
            5,
            True,
            [1, 2],
        ]
    ),
    st.binary(max_size=60).map(_no_image),
    st.builds(
        lambda data, end: _no_image(data[: len(data) * end // 100]),
        st.sampled_from(GOOD_IMAGES[:2]),
        st.integers(1, 60),
    ),
    st.builds(
        lambda magic, rest: _no_image(magic + rest),
        st.sampled_from(
            [
                b"\x89PNG\r\n\x1a\n",
                b"\xff\xd8\xff\xe0\0\x10JFIF\0",
                b"GIF89a",
                b"BM",
                b"II*\0",
                b"MM\0*",
                b"RIFF\0\0\0\0WEBPVP8 ",
                b"%!PS-Adobe-3.0 EPSF-3.0\n",
                b"\0\0\0\x0cjP  \r\n\x87\n",
                b"P6 9999999 9999999 255\n",
            ]
        ),
        st.binary(max_size=60),
    ),
)
_NO_NUMBER = st.sampled_from(
    [
        -1,
        True,
        False,
        "64",
        "",
        [],
        {},
        [64],
        {"a": 1},
        float("nan"),
        float("inf"),
        -float("inf"),
        10**400,
        -(10**400),
        1e308,
    ]
)
_NO_WHOLE = st.one_of(
    _NO_NUMBER, st.sampled_from([0.5, 64.5, 1.0, -0.0]), st.integers(max_value=-1)
)
ILLEGAL: Mapping[str, SearchStrategy[Any]] = {
    "prompt": st.sampled_from([None, 5, True, [], {}, ["a"], "\0", "\ud800", "a" * 2001, 1.5]),
    "negative_prompt": st.sampled_from([5, False, [], {}, "a\0b", "\udfff", "b" * 100_000]),
    "height": _NO_WHOLE | st.sampled_from([0, 1, 15, 5000, 2**31, 2**63, 10**18]),
    "width": _NO_WHOLE | st.sampled_from([0, 1, 15, 5000, 2**31, 2**63, 10**18]),
    "num_inference_steps": _NO_WHOLE | st.sampled_from([0, 101, 10**9, 2**64]),
    "guidance_scale": _NO_NUMBER
    | st.floats(max_value=-1e-9, allow_nan=False)
    | st.floats(50.5, allow_nan=False),
    "seed": _NO_WHOLE | st.integers(2**63),
    "strength": _NO_NUMBER | st.sampled_from([0, 0.0, -0.0, 1.0000001, 2]),
    "num_images": _NO_WHOLE | st.sampled_from([0, 101, 10**6]),
    "output_format": st.sampled_from(["gif", "PNG", "", 5, True, [], {}, ["png"]]),
    "response_format": st.sampled_from(["json", "IMAGE", "", 5, False, [], {}]),
    "stream": st.sampled_from([1, 0, "true", "yes", "", [], {}, 1.0, float("nan")]),
    "preview_every": _NO_WHOLE | st.sampled_from([101, 10**9, 2**64]),
    "num_previews": _NO_WHOLE | st.sampled_from([101, 10**9, 2**64]),
    "mask_channel": st.sampled_from(["red", "ALPHA", "", 5, True, [], {}]),
    "output_compression": _NO_WHOLE | st.sampled_from([101, 10**9]),
    "image": _BAD_IMAGES,
    "promt": st.none() | st.text(max_size=5),
    "": st.integers(),
    "\u00e9" * 70: st.booleans(),
    "__class__": st.text(max_size=5),
}
"""Values that no model takes, by the field that has to be named. What is unknown has a value of its
own kind.
"""


def _dumped(value: object) -> bytes:
    # NaN and Infinity too, which json.loads takes and JSON does not know
    return json.dumps(value).encode()


def _any_json() -> SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
    names = st.sampled_from([*FIELDS, "body", "data", "", "url_path"]) | st.text(max_size=5)
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
        max_leaves=8,
    )


def _broken(body: bytes, rng: Any) -> bytes:
    """JSON that was hurt in one place."""
    at = rng.randrange(len(body) + 1)
    return bytes(
        rng.choice(
            [
                body[:at],
                body[:at] + rng.randbytes(3) + body[at:],
                body[:at]
                + rng.choice([b"\0", b"\\", b'"', b"{", b"}", b",", b"\\ud800", b"\xff"])
                + body[at:],
                body[at:],
                body + body,
                b"\xef\xbb\xbf" + body,
                body.decode().encode("utf-16"),
                body.decode().encode("utf-32"),
                body.replace(b"{", b'{"prompt": 1, ', 1),  # a name that stands twice
                body[:-1] + b",}",
                body.replace(b'"', b"'"),
                b"[" + body + b"]",
                json.dumps(body.decode()).encode(),
            ]
        )
    )


def _exploding() -> bytes:
    """A small file that promises 20000x20000 pixels."""
    data = bytearray(_encoded("RGB", 24, 30, "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    return _dumped({"prompt": "a", "image": base64.b64encode(data).decode()})


MONSTERS: tuple[Callable[[], bytes], ...] = (
    lambda: b"[" * 60_000,
    lambda: b'{"prompt":' * 20_000,
    lambda: b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    lambda: b'{"prompt": "a", "seed": 1' + b"0" * 4_301 + b"}",
    lambda: b'{"prompt": "a", "guidance_scale": 1e999999999}',
    lambda: b'{"prompt": "a", "width": -1e-999999999}',
    lambda: b'{"prompt": "' + b"\xf0\x9f\x92\xa9" * 30_000 + b'"}',
    lambda: b'{"prompt": "' + b"\\u0000" * 100 + b'"}',
    lambda: b'{"prompt": "a", "height": [' + b"0," * 50_000 + b"0]}",
    lambda: b"{" + b",".join(b'"%d":0' % number for number in range(20_000)) + b"}",
    lambda: b'{"prompt": "a", "image": "' + b"A" * 150_000 + b'"}',
    lambda: b'{"prompt": "a", "image": "data:' + b"," * 150_000 + b'"}',
    lambda: b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}',
    lambda: b" " * 150_000,
    lambda: b"\0" * 100_000,
    lambda: b'{"prompt": "CUDA out of memory", "CUDA": "CUDA"}',
    _exploding,
)

_TYPES = st.sampled_from(
    [
        b"application/json",
        b"application/json; charset=utf-8",
        b"APPLICATION/JSON",
        b"application/json;charset=utf-16",
        b"application/jsonx",
        b"application/octet-stream",
        b"image/png",
        b"text/plain",
        b"Text/Plain; charset=nonsense",
        b"text/",
        b"multipart/form-data",
        b"multipart/mixed; boundary=fuzz",
        b"application/x-www-form-urlencoded",
        b"application/protobuf",
        b"*/*",
        b"/",
        b"",
    ]
)
_FORM_TYPES = st.sampled_from(
    [
        b"application/x-www-form-urlencoded",
        b"Application/X-WWW-Form-Urlencoded; charset=UTF-8",
        b"text/plain",
        b"application/json",
    ]
)
_MULTIPART_TYPES = st.sampled_from(
    [
        b"multipart/form-data; boundary=" + BOUNDARY,
        b"multipart/form-data; boundary=" + BOUNDARY,
        b"Multipart/Form-Data; Boundary=" + BOUNDARY,
        b'multipart/form-data; boundary="' + BOUNDARY + b'"',
        b"multipart/form-data; boundary=other",
        b"multipart/form-data; boundary=",
        b"multipart/form-data",
    ]
)
_WORDS = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20
).map(str.encode)
_ODD_HEADERS = st.one_of(
    st.tuples(
        st.sampled_from([b"describe", b"Describe", b"DESCRIBE", b"explain", b"Explain"]),
        st.sampled_from([b"True", b"true", b"1"]),
    ),
    st.tuples(
        st.sampled_from(
            [b"url_path", b"ts_stream_next", b"ts_request_sequence_id", b"x-preheat-nothing"]
        ),
        _WORDS,
    ),
    st.tuples(
        st.sampled_from([b"x-preheat-deadline", b"X-Preheat-Deadline"]),
        st.sampled_from(
            [
                b"0",
                b"-1",
                b"1",
                b"nan",
                b"1e400",
                b"9" * 400,
                b"soon",
                b"",
                b"99999999999999",
                b"0x10",
                b"\xb2",
            ]
        ),
    ),
    st.tuples(
        st.sampled_from(
            [b"Accept", b"Accept-Encoding", b"Cookie", b"Authorization", b"If-None-Match"]
        ),
        _WORDS,
    ),
    st.tuples(st.just(b"X-Long"), st.just(b"a" * 3000)),
    st.tuples(st.just(b"Content-Encoding"), st.sampled_from([b"identity", b"gzip", b"br"])),
)


def _headers(types: SearchStrategy[bytes]) -> SearchStrategy[Headers]:
    named = types.map(lambda one: (b"Content-Type", one))
    return st.builds(
        lambda first, others: (*first, *others),
        st.one_of(st.tuples(named), st.tuples(named), st.just(())),
        st.one_of(st.just([]), st.just([]), st.lists(_ODD_HEADERS, max_size=3)),
    )


def _bodies(
    kind: str, content: SearchStrategy[bytes], types: SearchStrategy[bytes] = _TYPES
) -> SearchStrategy[Sent]:
    """Over REST with headers of every kind, or as the input map's `data`."""
    over_rest = st.builds(
        lambda body, headers: Sent(kind, content=body, headers=headers), content, _headers(types)
    )
    over_grpc = st.builds(
        lambda body, protocol: Sent(kind, protocol=protocol, fields={"data": body}),
        content,
        st.sampled_from(GRPC),
    )
    return st.one_of(over_rest, over_rest, over_rest, over_grpc)


GRPC: tuple[Protocol, ...] = ("grpc", "grpc", "grpc-stream")


def _json_sent(
    kind: str,
    payload: Mapping[str, Any],
    expect: Literal["picture", "refusal"],
    at_fault: str | None = None,
) -> SearchStrategy[Sent]:
    body = _dumped(payload)
    size = (payload["height"], payload["width"]) if expect == "picture" else None
    whole = Sent(
        kind, content=body, headers=JSON_HEADER, expect=expect, at_fault=at_fault, size=size
    )
    spelled = [b"application/json; charset=utf-8", b"Application/JSON", b"application/octet-stream"]
    return st.one_of(
        st.just(whole),
        st.sampled_from(spelled).map(lambda one: replace(whole, headers=((b"content-type", one),))),
        _ODD_HEADERS.map(lambda odd: _with_header(whole, odd)),
        st.sampled_from(GRPC).map(
            lambda how: replace(whole, protocol=how, content=b"", headers=(), fields={"data": body})
        ),
    )


def _with_header(whole: Sent, odd: tuple[bytes, bytes]) -> Sent:
    """A header that says nothing to us must change nothing; one that says something may."""
    meant = odd[0].lower() in (b"x-preheat-deadline", b"content-encoding")
    headers = (*whole.headers, odd)
    return (
        replace(whole, headers=headers, expect="either", at_fault=None)
        if meant
        else replace(whole, headers=headers)
    )


def _raw(payload: Mapping[str, Any]) -> dict[str, bytes]:
    """The fields as parts of their own: text as UTF-8, numbers as JSON writes them, images as
    files.
    """
    parts = {}
    for name, value in payload.items():
        if name in ("image", "mask_image"):
            parts[name] = base64.b64decode(value)
        elif value is not None:
            parts[name] = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    return parts


def _map_sent(payload: Mapping[str, Any]) -> SearchStrategy[Sent]:
    size = (payload["height"], payload["width"])
    return st.sampled_from(GRPC).map(
        lambda how: Sent(
            "legal gRPC map", protocol=how, fields=_raw(payload), expect="picture", size=size
        )
    )


def _part(name: bytes, value: bytes, more: bytes = b"", lines: bytes = b"") -> bytes:
    return b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n%s\r\n%s\r\n' % (
        BOUNDARY,
        name,
        more,
        lines,
        value,
    )


def _multipart_legal(payload: Mapping[str, Any], rng: Any) -> Sent:
    parts = []
    for name, value in _raw({**payload, "prompt": payload["prompt"] or "a"}).items():
        is_file = name in ("image", "mask_image")
        more = b'; filename="a.png"' if is_file else b""
        lines = rng.choice([b"", b"Content-Type: image/png\r\n"]) if is_file else b""
        parts.append(_part(name.encode(), value, more, lines))
    rng.shuffle(parts)
    return Sent(
        "legal multipart",
        content=b"".join(parts) + b"--" + BOUNDARY + b"--\r\n",
        headers=((b"Content-Type", b"multipart/form-data; boundary=" + BOUNDARY),),
        expect="picture",
        size=(payload["height"], payload["width"]),
    )


def _text_sent(text: str) -> Sent:
    return Sent(
        "legal text",
        content=text.encode(),
        headers=((b"Content-Type", b"text/plain; charset=utf-8"),),
        expect="picture",
    )


def _parts() -> SearchStrategy[list[tuple[bytes, bytes]]]:
    names = st.sampled_from(
        [
            *(name.encode() for name in FIELDS),
            b"body",
            b"data",
            b"url_path",
            b"describe",
            b"content-type",
            b"Content-Type",
            b"",
        ]
    )
    names |= st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass"))
    values = st.one_of(
        st.sampled_from(
            [
                b"a",
                b"64",
                b"",
                b"NaN",
                b"null",
                b"[]",
                b'{"prompt": "a"}',
                b"1e400",
                b"\xff\xfe",
                *GOOD_IMAGES[:2],
            ]
        ),
        st.binary(max_size=30),
    )
    return st.lists(st.tuples(names, values), max_size=6)


def _multipart_hostile(parts: list[tuple[bytes, bytes]]) -> SearchStrategy[bytes]:
    mores = st.sampled_from(
        [b"", b'; filename="a"', b'; filename=""', b"; filename*=UTF-8''%ff", b'; name="prompt"']
    )
    lines = st.sampled_from(
        [
            b"",
            b"Content-Type: application/json\r\n",
            b"Content-Type: text/plain; charset=utf-16\r\n",
            b"Content-Type: text/nonsense; charset=nonsense\r\n",
            b"Content-Type: multipart/mixed; boundary=x\r\n",
            b"Content-Transfer-Encoding: base64\r\n",
            b"Content-Transfer-Encoding: nonsense\r\n",
            b"Content-Length: 99999\r\n",
        ]
    )
    ends = st.sampled_from(
        [
            b"--" + BOUNDARY + b"--\r\n",
            b"--" + BOUNDARY + b"--\r\n",
            b"--" + BOUNDARY,
            b"",
            b"\r\n\r\n",
        ]
    )
    return st.builds(
        lambda decorations, end: (
            b"".join(_part(*part, *how) for part, how in zip(parts, decorations, strict=True)) + end
        ),
        st.lists(st.tuples(mores, lines), min_size=len(parts), max_size=len(parts)),
        ends,
    )


def _maps() -> SearchStrategy[Sent]:
    """Input maps of any names and values."""
    names = st.sampled_from(
        [
            *FIELDS,
            "data",
            "body",
            "",
            "url_path",
            "ts_stream_next",
            "ts_request_sequence_id",
            "describe",
            "content-type",
        ]
    )
    names |= st.text(_CHARS, max_size=5)
    values = st.one_of(
        st.sampled_from(
            [
                b"",
                b"a",
                b"64",
                b"-1",
                b"NaN",
                b"null",
                b"{}",
                b'{"prompt": "a"}',
                b"\xff",
                b"1e400",
                *GOOD_IMAGES[:2],
            ]
        ),
        payloads().map(_dumped),
        st.binary(max_size=30),
    )
    maps = st.dictionaries(names, values, max_size=5)
    return st.builds(
        lambda fields, how: Sent("any gRPC map", protocol=how, fields=fields),
        maps,
        st.sampled_from(GRPC),
    )
