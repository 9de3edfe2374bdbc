"""Tensors out of hostile bytes, and back: nothing but a RequestError that names the input, and pad then cut is identity."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from preheat import tensors
from preheat.errors import RequestError
from preheat.module_config import InputConfig, ModuleLimits
from preheat.module_request import Reader

IDS = InputConfig.model_validate({"dtype": "int64", "shape": ["batch", "n"], "buckets": {"n": [8]}})
MASK = InputConfig.model_validate({"dtype": "int64", "shape": ["batch", "n"], "default": 1.0})
PIXELS = InputConfig.model_validate(
    {"dtype": "float32", "shape": ["batch", 3, "h", "w"], "buckets": {"h": [8], "w": [8]}}
)
TEXTS = Reader(("ids", "mask"), {"ids": IDS, "mask": MASK}, ModuleLimits())
IMAGES = Reader(("pixels",), {"pixels": PIXELS}, ModuleLimits())
NAMES = {"ids", "mask", "pixels", "body", "text", "accept"}


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def read(reader: Reader, body: object, **headers: str) -> dict[str, torch.Tensor]:
    return reader.read({"body": body}, {name.replace("_", "-"): text for name, text in headers.items()})[0]


def field_of(reader: Reader, row: object, headers: dict[str, str] | None = None) -> str | None:
    with pytest.raises(RequestError) as caught:
        reader.read(row, headers or {})
    assert caught.value.message and len(caught.value.message) < 300
    return caught.value.field


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SHAPES, st.data(), st.sampled_from(["edge", 0.0, -3.0]))
def test_what_is_padded_and_cut_again_is_what_it_was(shape: list[int], data: st.DataObject, pad: float | str) -> None:
    tensor = torch.arange(torch.tensor(shape).prod().item()).reshape(shape)
    larger = [size + data.draw(st.integers(0, 3)) for size in shape]
    padded = tensors.pad_to(tensor, larger, pad)
    assert list(padded.shape) == larger and padded.dtype == tensor.dtype
    assert torch.equal(tensors.cut_to(padded, dict(enumerate(shape))), tensor)
    margins = [(0, more - size) for size, more in zip(shape, larger, strict=True)]
    how: dict[str, Any] = {"mode": "edge"} if pad == "edge" else {"constant_values": pad}
    assert (padded.numpy() == np.pad(tensor.numpy(), margins, **how)).all()


@given(npst.arrays(st.sampled_from(["<f4", "<i8", "u1", "?"]), npst.array_shapes(max_dims=3, max_side=4)))
def test_json_npy_and_safetensors_give_back_what_went_in(array: Any) -> None:
    tensor, dtype = torch.from_numpy(array), str(array.dtype)
    assert torch.equal(torch.nan_to_num(tensors.from_npy(npy(array), "x")), torch.nan_to_num(tensor))
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
        assert torch.equal(found["ids"], ids) and torch.equal(found["mask"], torch.ones(1, 3, dtype=torch.int64))
    part_by_part = TEXTS.read({"ids": npy(ids.numpy()), "mask": b"[1, 0, 0]", "accept": b"application/x-npy"}, {})
    assert part_by_part[0]["mask"].tolist() == [[1, 0, 0]] and part_by_part[1] == "application/x-npy"


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
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2)))),  # float64 is wider
    ("pixels", IMAGES, npy(np.zeros((4, 2, 2), np.float32))),
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.float32))[:-1]),  # corrupt
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.float32)) + b"x"),
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.float32)).replace(b"(3, 2, 2)", b"(3,2,10)")),
    ("pixels", IMAGES, npy(np.zeros((3, 2, 2), np.complex64))),
    ("pixels", IMAGES, npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)),  # pickle inside
    ("pixels", IMAGES, b"\x93NUMPY"),
    ("pixels", IMAGES, b"\x89PNG\r\n\x1a\nbroken"),
    ("body", TEXTS, pickle.dumps([1])),
    ("body", TEXTS, b"PK\x03\x04"),
    ("body", TEXTS, safetensors.torch.save({"ids": torch.ones(2)})[:-1]),
    ("body", TEXTS, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    ("body", TEXTS, b"{"),
    ("body", TEXTS, b"\x01\x02"),
    ("body", TEXTS, b"[" * 100_000),
    ("other", TEXTS, safetensors.torch.save({"other": torch.ones(2)})),
]


@pytest.mark.parametrize(("field", "reader", "body"), BAD, ids=[f"{f}-{str(b)[:24]!r}" for f, _, b in BAD])
def test_bad_input_is_a_refusal_that_names_the_input(field: str, reader: Reader, body: object) -> None:
    # An empty JSON object has no input at all; of the two, the one without a default is missed.
    assert field_of(reader, {"body": body}) == (field if body != {} else "ids")


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
    assert TEXTS.read({"body": {"ids": [1]}}, {"accept": "text/html, */*;q=0.1"})[1] == "application/json"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda each: st.lists(each, max_size=3),
)
BYTES = st.binary(max_size=60) | st.sampled_from([b for _, _, b in BAD if isinstance(b, bytes) and len(b) < 1000])


@given(
    st.dictionaries(st.sampled_from(["body", "data", "ids", "mask", "pixels", "text", "accept"]) | st.text(max_size=3),
                    VALUES | BYTES | st.dictionaries(st.sampled_from(["inputs", "ids", "text"]), VALUES), max_size=3),
    st.sampled_from([TEXTS, IMAGES]),
    st.sampled_from(["application/json", "application/x-npy", "application/safetensors", "image/png", "text/plain", ""]),
)  # fmt: skip
def test_whatever_comes_is_a_request_or_a_refusal(row: dict[str, Any], reader: Reader, content_type: str) -> None:
    try:
        found, _ = reader.read(row, {"content-type": content_type})
    except RequestError as error:
        assert error.field is None or error.field in NAMES or error.field.isascii()
    else:
        assert set(found) == set(reader.names) and all(tensor.shape[0] == 1 for tensor in found.values())


@given(BYTES)
def test_mutilated_files_are_refused_or_read(data: bytes) -> None:
    for read_one in (lambda: tensors.from_npy(data, "x"), lambda: tensors.from_safetensors(data)):
        try:
            read_one()
        except RequestError as error:
            assert error.field in ("x", "body")
