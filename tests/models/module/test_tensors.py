"""Tensors out of hostile bytes, and back: nothing but a RequestError that names the input, and pad
then cut is identity.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from tokenizers import NormalizedString

from preheat.config.module import InputConfig, ModuleLimits
from preheat.errors import RequestError
from preheat.models.module import tensors
from preheat.models.module.request import Reader
from preheat.protocol import json_text

IDS = InputConfig.model_validate({"dtype": "int64", "shape": ["batch", "n"], "buckets": {"n": [8]}})
MASK = InputConfig.model_validate({"dtype": "int64", "shape": ["batch", "n"], "default": 1.0})
PIXELS = InputConfig.model_validate(
    {"dtype": "float32", "shape": ["batch", 3, "h", "w"], "buckets": {"h": [8], "w": [8]}}
)
LIMITS = ModuleLimits(max_elements=1000)


def reader(
    specs: dict[str, InputConfig] | None,
    *,
    largest: dict[str, int] | None = None,
    names: Any = (),
    **more: Any,
) -> Reader:
    """A reader; with the `largest` buckets it rejects what is larger."""
    bounds = tensors.Bounds(largest or {}, bool(largest), LIMITS.max_elements)
    computed = more.pop("computed", torch.float32)
    return Reader(
        names or tuple(specs or ()), specs, LIMITS, bounds, computed, more.pop("ranges", {}), **more
    )


TEXTS = reader({"ids": IDS, "mask": MASK}, largest={"n": 8})
IMAGES = reader({"pixels": PIXELS}, largest={"h": 8, "w": 8})
OPEN = reader(None, names=("ids", "pixels"))
NAMES = {"ids", "mask", "pixels", "small", "body", "text", "accept"}


def npy_header(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    """An .npy file whose header says whatever it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return tensors.NPY_MAGIC + b"\x01\x00" + len(header).to_bytes(2, "little") + header + data


def safetensors_header(dtype: str, shape: list[int], data: bytes = b"") -> bytes:
    header = json.dumps(
        {"ids": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + data


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def read(reader: Reader, body: object, **headers: str) -> dict[str, torch.Tensor]:
    return reader.read(
        {"body": body}, {name.replace("_", "-"): text for name, text in headers.items()}
    )[0]


def field_of(reader: Reader, row: object, headers: dict[str, str] | None = None) -> str | None:
    with pytest.raises(RequestError) as caught:
        reader.read(row, headers or {})
    assert caught.value.message and len(caught.value.message) < 300
    return caught.value.field


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(deadline=None)
@given(SHAPES, st.data(), st.sampled_from(["edge", 0.0, -3.0]))
def test_what_is_padded_and_cut_again_is_what_it_was(
    shape: list[int], data: st.DataObject, pad: float | str
) -> None:
    tensor = torch.arange(torch.tensor(shape).prod().item()).reshape(shape)
    larger = [size + data.draw(st.integers(0, 3)) for size in shape]
    padded = tensors.pad_to(tensor, larger, pad)
    assert list(padded.shape) == larger and padded.dtype == tensor.dtype
    assert torch.equal(tensors.cut_to(padded, dict(enumerate(shape))), tensor)
    margins = [(0, more - size) for size, more in zip(shape, larger, strict=True)]
    how: dict[str, Any] = {"mode": "edge"} if pad == "edge" else {"constant_values": pad}
    assert (padded.numpy() == np.pad(tensor.numpy(), margins, **how)).all()


@settings(deadline=None)
@given(
    npst.arrays(
        st.sampled_from(["<f4", "<i8", "u1", "?"]), npst.array_shapes(max_dims=3, max_side=4)
    )
)
def test_json_npy_and_safetensors_give_back_what_went_in(array: Any) -> None:
    tensor, dtype = torch.from_numpy(array), str(array.dtype)
    assert torch.equal(
        torch.nan_to_num(tensors.from_npy(npy(array), "x")), torch.nan_to_num(tensor)
    )
    assert tensors.to_npy(tensor) == npy(array)
    (back,) = tensors.from_safetensors(tensors.to_safetensors({"x": tensor}, {})).values()
    assert torch.equal(torch.nan_to_num(back), torch.nan_to_num(tensor))
    lists = tensors.to_lists(tensor)
    json.dumps(lists, allow_nan=False)
    if np.isfinite(array).all():
        assert torch.equal(tensors.from_list(lists, dtype, "x"), tensor)


def test_fortran_order_and_foreign_byte_order_are_read() -> None:
    array = np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))
    assert tensors.from_npy(npy(array), "x").tolist() == array.tolist()


def test_a_request_is_one_row_in_any_of_its_forms() -> None:
    ids = torch.tensor([[1, 2, 3]])
    forms: list[Any] = [
        {"inputs": {"ids": [1, 2, 3]}},
        {"ids": [[1, 2, 3]]},
        [1, 2, 3],
        b'{"ids": [1, 2, 3]}',
        npy(ids.numpy()),
        safetensors.torch.save({"ids": ids[0]}),
        npy(ids.numpy().astype(np.int32)),
    ]
    for form in forms:
        found = read(TEXTS, form)
        assert torch.equal(found["ids"], ids) and torch.equal(
            found["mask"], torch.ones(1, 3, dtype=torch.int64)
        )
    part_by_part = TEXTS.read(
        {"ids": npy(ids.numpy()), "mask": b"[1, 0, 0]", "accept": b"application/x-npy"}, {}
    )
    assert (
        part_by_part[0]["mask"].tolist() == [[1, 0, 0]] and part_by_part[1] == "application/x-npy"
    )


BAD: list[tuple[str, Reader, object]] = [
    ("ids", TEXTS, {"ids": [[[1]]]}),  # rank
    ("ids", TEXTS, {"ids": 1}),
    ("ids", TEXTS, {"ids": [1.5]}),  # dtype
    ("ids", TEXTS, {"ids": [True]}),
    ("ids", TEXTS, {"ids": ["1"]}),
    ("ids", TEXTS, {"ids": [None]}),
    ("ids", TEXTS, {"ids": [2**63]}),
    ("ids", TEXTS, {"ids": [10**4000]}),
    ("ids", TEXTS, {"ids": [[1, 2], [3]]}),  # ragged
    ("ids", TEXTS, {"ids": [1, [2]]}),
    ("ids", TEXTS, {"ids": []}),
    ("ids", TEXTS, {"ids": [[1], [2]]}),  # two rows
    ("ids", TEXTS, {"ids": {"a": 1}}),
    ("ids", TEXTS, {"ids": "not an image"}),
    ("ids", TEXTS, {"mask": [1]}),  # missing
    ("mask", TEXTS, {"ids": [1, 2], "mask": [1]}),  # another length
    ("idz", TEXTS, {"idz": [1]}),
    ("body", TEXTS, {}),
    ("text", TEXTS, {"text": "no tokenizer"}),
    ("pixels", IMAGES, {"pixels": [[[0.0]]]}),
    ("pixels", IMAGES, {"pixels": [[[float("nan")]]] * 3}),
    ("pixels", IMAGES, {"pixels": [[[1e300]]] * 3}),
    ("pixels", IMAGES, npy(np.full((3, 2, 2), 1e300))),  # no float32
    ("pixels", IMAGES, npy(np.ones((3, 2, 2), bool))),
    ("ids", TEXTS, npy(np.ones(2, np.float32))),
    (
        "small",
        reader(
            {
                "small": InputConfig.model_validate(
                    {"dtype": "int8", "shape": ["batch", 2], "range": [0, 9]}
                )
            }
        ),
        npy(np.array([256, 0])),
    ),
    ("pixels", IMAGES, npy(np.zeros((4, 2, 2), np.float32))),
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.float32))[:-1]),  # corrupt
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.float32)) + b"x"),
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.float32)).replace(b"(3, 2, 2)", b"(3,2,10)")),
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.complex64))),
    ("pixels", IMAGES, npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)),  # pickle inside
    ("pixels", IMAGES, b"\x93NUMPY"),
    ("pixels", IMAGES, b"\x89PNG\r\n\x1a\nbroken"),
    ("ids", TEXTS, npy(np.array([1, 2], np.uint16))),  # torch promotes these to nothing
    ("ids", TEXTS, npy(np.array([1, 2], np.uint64))),
    ("ids", TEXTS, safetensors_header("U32", [1], b"\1\0\0\0")),
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.uint16))),
    ("ids", OPEN, {"ids": [0] * 1001}),
    ("ids", OPEN, {"ids": [1e300]}),
    ("ids", OPEN, safetensors_header("F8_E4M3", [1], b"\0")),
    ("ids", OPEN, safetensors_header("U16", [1], b"\0\0")),
    ("pixels", IMAGES, npy_header(f"({10**30}, 0)")),  # beside a zero, any size is no bytes
    ("pixels", IMAGES, npy_header(f"({2**62}, {2**62}, 0)")),
    ("pixels", IMAGES, npy_header(f"({2**63}, 0)")),
    ("body", TEXTS, safetensors_header("F32", [0, 2**63])),
    ("body", TEXTS, safetensors_header("F32", [0, 2**64])),
    ("pixels", IMAGES, npy(np.full((3, 2, 2), np.nan, np.float32))),
    ("pixels", IMAGES, npy(np.full((3, 2, 2), -np.inf, np.float32))),
    ("ids", TEXTS, {"ids": [0] * 9}),  # buckets
    ("pixels", IMAGES, npy(np.zeros((3, 9, 2), np.float32))),
    ("body", TEXTS, pickle.dumps([1])),
    ("body", TEXTS, b"PK\x03\x04"),
    ("body", TEXTS, safetensors.torch.save({"ids": torch.ones(2)})[:-1]),
    ("body", TEXTS, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    ("body", TEXTS, b"{"),
    ("body", TEXTS, b"\x01\x02"),
    ("body", TEXTS, b"[" * 100_000),
    ("other", TEXTS, safetensors.torch.save({"other": torch.ones(2)})),
]


@pytest.mark.parametrize(
    ("field", "reader", "body"), BAD, ids=[f"{f}-{str(b)[:24]!r}" for f, _, b in BAD]
)
def test_bad_input_is_a_refusal_that_names_the_input(
    field: str, reader: Reader, body: object
) -> None:
    # An empty JSON object has no input at all; of the two, the one without a default is missed.
    assert field_of(reader, {"body": body}) == (field if body != {} else "ids")


def test_a_float_that_overflows_in_the_modules_dtype_is_refused() -> None:
    for wide, computed in ((torch.float64, torch.float32), (torch.float32, torch.float16)):
        data = safetensors.torch.save(
            {"x": torch.full((1, 1), 1e38 if computed is torch.float16 else 1e300, dtype=wide)}
        )
        spec = InputConfig.model_validate({"dtype": str(wide)[6:], "shape": ["batch", 1]})
        for each in (
            reader({"x": spec}, computed=computed),
            reader(None, names=("x",), computed=computed),
        ):
            assert field_of(each, {"body": data}) == "x"


@pytest.mark.parametrize("sent", [np.float64, np.float16, np.float32, np.int16, np.int64, np.uint8])
def test_numbers_in_files_are_cast_as_those_of_json_are(sent: Any) -> None:
    array = (np.arange(12) % 7).reshape(3, 2, 2).astype(sent)
    for body in (npy(array), safetensors.torch.save({"pixels": torch.from_numpy(array)})):
        found = read(IMAGES, body)["pixels"]
        assert found.dtype == torch.float32 and torch.equal(
            found, read(IMAGES, array.tolist())["pixels"]
        )


def test_whole_numbers_are_cast_to_a_smaller_dtype_that_holds_them() -> None:
    spec = InputConfig.model_validate(
        {"dtype": "int8", "shape": ["batch", 2], "range": [-128, 127]}
    )
    found = read(reader({"x": spec}), npy(np.array([-128, 127])))["x"]
    assert found.dtype == torch.int8 and found.tolist() == [[-128, 127]]


@pytest.mark.parametrize(
    ("of", "rows"),
    [(TEXTS, [[1]] * 5000), (TEXTS, [1] * 5000), (OPEN, [1] * 5000), (OPEN, [[1] * 50] * 50)],
    ids=["rows", "long", "undeclared", "undeclared and nested"],
)
def test_lists_too_large_are_refused_before_they_are_walked(
    of: Reader, rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "from_list", lambda *_: pytest.fail("it was made a tensor"))
    assert field_of(of, {"body": {"ids": rows}}) == "ids"


@pytest.mark.parametrize(("of", "most"), [(TEXTS, 16), (OPEN, 2000)])
def test_json_of_more_numbers_than_a_model_takes_is_not_read(
    of: Reader, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "loads", lambda _: pytest.fail("it was read"))
    body = b"[" + b",".join([b"[1]"] * (most + LIMITS.max_text_chars + 2)) + b"]"
    assert field_of(of, {"body": body}) == "body" and field_of(of, {"ids": body}) == "ids"


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", ""]
)
def test_json_that_torchserve_has_not_decoded_is_read(content_type: str) -> None:
    """As with decode_input_request=false, where every body comes as bytes."""
    body = json.dumps({"inputs": {"ids": [1, 2], "mask": [1, 0]}}).encode()
    for sent in (body, bytearray(body)):
        assert read(TEXTS, sent, content_type=content_type)["mask"].tolist() == [[1, 0]]
    assert read(TEXTS, b"[1, 2]", content_type=content_type)["ids"].tolist() == [[1, 2]]


def test_a_number_outside_its_range_is_refused() -> None:
    ranged = reader({"ids": IDS}, ranges={"ids": (0, 9)})
    assert read(ranged, [0, 9])["ids"].tolist() == [[0, 9]]
    for ids in ([10], [-1, 3], [2**62]):
        assert field_of(ranged, {"body": ids}) == "ids"
    assert field_of(reader(None, names=("ids",), ranges={"ids": (0, 9)}), {"body": [10]}) == "ids"


def test_nothing_is_filled_or_converted_before_its_size_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small part may ask for a large one: a default as large as two other inputs, an image that
    no bucket holds.
    """
    specs = {
        "a": InputConfig.model_validate({"shape": ["batch", "n"], "buckets": {"n": [8]}}),
        "b": InputConfig.model_validate({"shape": ["batch", "m"], "buckets": {"m": [8]}}),
        "both": InputConfig.model_validate({"shape": ["batch", "n", "m"], "default": 0.0}),
    }
    monkeypatch.setattr(torch, "full", lambda *_args, **_more: pytest.fail("it was filled"))
    body = {"a": [0.0] * 40, "b": [0.0] * 40}
    eager = dataclasses.replace(reader(specs), bounds=tensors.Bounds({"n": 8, "m": 8}, False, 1000))
    assert field_of(eager, {"body": body}) == "both"
    assert field_of(reader(specs, largest={"n": 8, "m": 8}), {"body": body}) == "a"
    image = io.BytesIO()
    Image.new("RGB", (9, 8)).save(image, "png")
    monkeypatch.setattr(torch, "from_numpy", lambda _: pytest.fail("it was converted"))
    assert field_of(IMAGES, {"body": image.getvalue()}) == "pixels"


def test_a_text_that_the_tokenizer_fails_on_is_refused() -> None:
    def failing(text: str, *, return_tensors: str) -> Any:
        raise KeyError(text)

    def panicking(text: str, *, return_tensors: str) -> Any:
        # what filter gives may not raise: Rust panics
        NormalizedString(text).filter(lambda _: 1 / 0)

    for tokenizer in (failing, panicking):
        assert (
            field_of(reader({"ids": IDS}, tokenizer=tokenizer), {"body": {"text": "a"}}) == "text"
        )


def test_a_pickle_in_any_input_is_refused_before_it_is_read() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return pytest.fail, ("it was unpickled",)

    for data in (pickle.dumps(Bomb()), npy(np.array([Bomb()], dtype=object), allow_pickle=True)):
        assert field_of(IMAGES, {"body": data}) in ("body", "pixels")
        assert field_of(IMAGES, {"pixels": data}) == "pixels"


def test_an_answer_nobody_can_give_is_406() -> None:
    with pytest.raises(RequestError) as caught:
        TEXTS.read({"body": {"ids": [1]}}, {"accept": "image/png"})
    assert (caught.value.field, caught.value.code) == ("accept", 406)
    assert (
        TEXTS.read({"body": {"ids": [1]}}, {"accept": "text/html, */*;q=0.1"})[1]
        == "application/json"
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda each: st.lists(each, max_size=3),
)
BYTES = st.binary(max_size=60) | st.sampled_from(
    [b for _, _, b in BAD if isinstance(b, bytes) and len(b) < 1000]
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["body", "data", "ids", "mask", "pixels", "text", "accept"])
        | st.text(max_size=3),
        VALUES | BYTES | st.dictionaries(st.sampled_from(["inputs", "ids", "text"]), VALUES),
        max_size=3,
    ),
    st.sampled_from([TEXTS, IMAGES]),
    st.sampled_from(
        [
            "application/json",
            "application/x-npy",
            "application/safetensors",
            "image/png",
            "text/plain",
            "",
        ]
    ),
)
def test_whatever_comes_is_a_request_or_a_refusal(
    row: dict[str, Any], reader: Reader, content_type: str
) -> None:
    try:
        found, _ = reader.read(row, {"content-type": content_type})
    except RequestError as error:
        assert error.field is None or error.field in NAMES or error.field.isascii()
    else:
        assert set(found) == set(reader.names) and all(
            tensor.shape[0] == 1 for tensor in found.values()
        )


@settings(deadline=None)
@given(BYTES)
def test_mutilated_files_are_refused_or_read(data: bytes) -> None:
    for read_one in (lambda: tensors.from_npy(data, "x"), lambda: tensors.from_safetensors(data)):
        try:
            read_one()
        except RequestError as error:
            assert error.field in ("x", "body")


BERT_LIKE = reader(
    {
        "input_ids": InputConfig.model_validate(
            {"dtype": "int64", "shape": ["batch", "n"], "buckets": {"n": [8]}}
        ),
        "mask": MASK,
    },
    largest={"n": 8},
    ranges={"input_ids": (0, 98)},
)
SIZES = st.sampled_from([0, 1, 2, 3, 8, 9, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30])
ANY_SHAPE = st.lists(SIZES, max_size=5)
PAYLOAD = st.binary(max_size=32)
MADE_UP = (
    st.builds(
        lambda shape, dtype, data: npy_header(str(tuple(shape)), dtype, data),
        ANY_SHAPE,
        st.sampled_from(
            [
                "<f4",
                "<f8",
                "<f2",
                "<i8",
                "<i4",
                "<u2",
                "<u8",
                "|u1",
                "|b1",
                ">i8",
                "<c8",
                "|O",
                "<U2",
                "M8",
            ]
        ),
        PAYLOAD,
    )
    | st.builds(
        safetensors_header,
        st.sampled_from(
            [
                "F32",
                "F64",
                "F16",
                "BF16",
                "I64",
                "I8",
                "U8",
                "U16",
                "U64",
                "BOOL",
                "F8_E5M2",
                "C64",
                "X",
            ]
        ),
        ANY_SHAPE,
        PAYLOAD,
    )
    | PAYLOAD.map(lambda data: tensors.NPY_MAGIC + data)
    | PAYLOAD.map(lambda data: len(data).to_bytes(8, "little") + b"{" + data)
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A made-up file with a few bytes changed, or its end missing."""
    data = bytearray(draw(MADE_UP))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))] if draw(st.booleans()) else data)


@given(
    mutated()
    | VALUES
    | st.dictionaries(st.sampled_from(["inputs", "input_ids", "mask", "pixels", "ids"]), VALUES),
    st.sampled_from([BERT_LIKE, IMAGES, OPEN]),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_made_up_files_and_lists_are_requests_or_refusals(
    body: object, of: Reader, named: bool
) -> None:
    try:
        found, _ = of.read({of.names[0] if named else "body": body}, {})
    except RequestError as error:
        assert error.field is not None and len(error.message) < 300
    else:
        assert found and all(tensor.isfinite().all() for tensor in found.values())
