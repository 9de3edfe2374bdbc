"""Requests: every shape of a row, every limit, and whatever a hostile client thinks of."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preheat.config.diffusion import DefaultsConfig, LimitsConfig
from preheat.errors import RequestError
from preheat.models.diffusion.request import FIELDS, NUM_SEEDS, ImageRequest, parse_row

LIMITS = LimitsConfig(max_steps=50, max_prompt_chars=100, max_image_bytes=300, max_images=4)
DEFAULTS = DefaultsConfig(
    num_inference_steps=7, guidance_scale=4.5, strength=0.5, output_format="webp"
)
FILE = bytes(range(200))  # request does not look inside an image
CODED = base64.b64encode(FILE).decode()


def parse(row: Any, **kwargs: Any) -> ImageRequest:
    return parse_row(row, limits=LIMITS, defaults=DEFAULTS, **kwargs)


def of(**fields: Any) -> ImageRequest:
    return parse({"body": {"prompt": "a cat", **fields}})


def refused(row: Any, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(row, **kwargs)
    error = caught.value
    assert error.code == 400 and error.field and error.message.split()[0] in VERBS
    assert str(error).isprintable() and len(str(error)) < 400
    json.dumps(error.body()).encode()
    return error


def refused_of(**fields: Any) -> RequestError:
    return refused({"body": {"prompt": "a cat", **fields}})


# --- the shapes of a row


def test_a_prompt_is_enough_and_the_rest_is_the_default() -> None:
    request = of()
    assert request.prompt == "a cat" and request.negative_prompt is None
    assert (request.height, request.width) == (None, None)
    assert (
        request.num_inference_steps == 7
        and request.guidance_scale == 4.5
        and request.strength == 0.5
    )
    assert (
        request.output_format == "webp"
        and request.response_format == "image"
        and request.num_images == 1
    )
    assert request.task == "text-to-image" and 0 <= request.seed < NUM_SEEDS


def test_a_seed_is_drawn_anew_for_each_request_without_one() -> None:
    assert len({of().seed for _ in range(20)}) == 20


def test_a_seed_that_is_drawn_survives_whoever_reads_json_into_doubles() -> None:
    assert all(int(float(seed)) == seed for seed in (of().seed for _ in range(200)))


@pytest.mark.parametrize("row", [{"body": bytearray(b"a cat")}, {}])
def test_a_prompt_without_its_content_type_is_told_of_text_plain(row: dict[str, object]) -> None:
    assert "text/plain" in refused(row).message


VERBS = ("is", "must", "has", "holds", "needs", "asks", "cannot")
"""What a message can begin with, since clients read it after the field's name."""


FULL = {
    "prompt": "ein Käse \N{CHEESE WEDGE}",
    "negative_prompt": "",
    "height": 100,
    "width": 37,
    "num_inference_steps": 10,
    "guidance_scale": 3,
    "seed": 2**63 - 1,
    "strength": 0.25,
    "num_images": 2,
    "output_format": "jpeg",
    "response_format": "b64_json",
}


def parts(**more: bytes) -> dict[str, object]:
    """FULL as multipart fields or a gRPC map carry it."""
    return {**{name: bytearray(str(value).encode()) for name, value in FULL.items()}, **more}


@pytest.mark.parametrize(
    "row",
    [
        {"body": {**FULL, "image": CODED}},
        {"body": bytearray(json.dumps({**FULL, "image": CODED}).encode())},
        {"data": json.dumps({**FULL, "image": CODED}, ensure_ascii=False).encode()},
        {"data": json.dumps(FULL).encode(), "image": FILE},
        {"body": FULL, "image": bytearray(FILE)},
        parts(image=FILE),
        {
            name: value.decode() if name != "image" else value  # type: ignore[attr-defined]
            for name, value in parts(image=FILE).items()
        },
    ],
    ids=[
        "json",
        "unparsed json",
        "grpc",
        "grpc with file",
        "json with file",
        "multipart",
        "multipart as text",
    ],
)
def test_every_shape_of_a_row_means_the_same(row: dict[str, object]) -> None:
    assert parse(row) == ImageRequest(**{**FULL, "image": FILE, "mask_image": None})  # type: ignore[arg-type]


def test_plain_text_is_a_prompt() -> None:
    assert parse({"body": "a cat"}).prompt == "a cat"
    assert parse({"body": '{"prompt": "a cat"}'}).prompt == '{"prompt": "a cat"}'


PLAIN = "text/plain; charset=utf-8"


@pytest.mark.parametrize("body", [b"a cat", bytearray(b"a cat"), "a cat"])
@pytest.mark.parametrize("content_type", [PLAIN, "TEXT/Plain"])
def test_text_is_a_prompt_whether_torchserve_decodes_it_or_not(
    body: object, content_type: str
) -> None:
    assert parse({"body": body}, content_type=content_type).prompt == "a cat"


@pytest.mark.parametrize(("body", "says"), [(b"\xff", "is not UTF-8 (byte 0)"), (b"", "is empty")])
def test_text_that_is_none_is_refused(body: bytes, says: str) -> None:
    error = refused({"body": body}, content_type=PLAIN)
    assert error.field == "body" and says in error.message


def test_null_is_as_good_as_absent_and_an_empty_prompt_is_a_prompt() -> None:
    request = of(**dict.fromkeys(set(FIELDS) - {"prompt"}), prompt="")
    assert (
        request.prompt == ""
        and request.num_inference_steps == 7
        and request.task == "text-to-image"
    )


def test_the_row_is_left_as_it_was() -> None:
    body = {"prompt": "a cat", "image": CODED}
    row = {"body": body, "mask_image": FILE}
    parse(row)
    assert row == {"body": body, "mask_image": FILE} and body == {"prompt": "a cat", "image": CODED}


@pytest.mark.parametrize(
    "row",
    [
        {},
        None,
        [],
        "a cat",
        {"body": None},
        {"body": b""},
        {"body": bytearray()},
        {"body": ""},
        {"data": b""},
    ],
)
def test_an_empty_row_says_how_to_send_one(row: object) -> None:
    error = refused(row)
    assert error.field == "body" and "JSON" in error.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "line 1 column 2"),
        (b"prompt=a+cat", "not JSON"),
        (b"[1]", "got a list"),
        (b'"a cat"', "got 'a cat'"),
        (b"null", "got null"),
        (b"\xff\xfe", "UTF-8"),
        (json.dumps({"prompt": "x"}).encode("utf-16"), "UTF-8"),
        (b"[" * 200_000, "nested"),
        (b'{"prompt":' * 200_000, "nested"),
        ([{"prompt": "a cat"}], "got a list"),
        (7, "got 7"),
        (True, "got true"),
    ],
)
def test_a_body_that_is_no_object_says_so(body: object, says: str) -> None:
    error = refused({"body": body})
    assert error.field == "body" and says in error.message


def test_a_name_given_twice_is_refused() -> None:
    assert refused({"data": b'{"prompt": "a", "prompt": "b"}'}).field == "prompt"
    assert refused({"data": b'{"prompt": "a", "seed": 1}', "seed": b"1"}).field == "seed"
    assert refused({"data": b'{"prompt": "a"}', "body": b'{"prompt": "a"}'}).field == "body"


def test_an_unknown_field_is_named_with_the_closest_known_one() -> None:
    error = refused_of(heigth=64)
    assert error.field == "heigth" and "did you mean height?" in error.message
    assert "known are prompt" in refused_of(zzz=1).message


@pytest.mark.parametrize("name", ["x" * 1_000_000, "\ud800", "a\nb", "", "\N{CHEESE WEDGE}" * 40])
def test_an_unknown_name_is_quoted_short_and_printable(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        of(**{name: 1})
    assert caught.value.field and len(caught.value.field) <= 64
    assert str(caught.value).isprintable() and str(caught.value).isascii()


# --- the limits


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("height", 16, 4096),
        ("width", 16, 4096),
        ("num_inference_steps", 1, 50),
        ("seed", 0, 2**63 - 1),
        ("num_images", 1, 4),
    ],
)
def test_whole_numbers_keep_to_their_range(name: str, low: int, high: int) -> None:
    for edge in (low, high):
        assert getattr(of(**{name: edge, "response_format": "b64_json"}), name) == edge
    wrong = [
        low - 1,
        high + 1,
        -1,
        10**4000,
        -(10**4000),
        32.0,
        32.5,
        math.nan,
        math.inf,
        -math.inf,
    ]
    for value in (*wrong, True, "32", "", [32], {"a": 1}, [[]]):
        error = refused_of(**{name: value})
        assert error.field == name and f"from {low} to {high}" in error.message


@pytest.mark.parametrize(
    ("name", "legal", "wrong"),
    [
        ("guidance_scale", [0, 0.0, 1, 7.5, 50], [-0.001, 50.001]),
        ("strength", [0.15, 0.5, 1, 1.0], [0, 0.0, -0.0, -1, 1.0000001]),
    ],
)
def test_numbers_keep_to_their_range(name: str, legal: list[float], wrong: list[float]) -> None:
    for value in legal:
        got = getattr(of(**{name: value}), name)
        assert got == value and type(got) is float
    for hostile in (
        *wrong,
        10**4000,
        -(10**4000),
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        "1",
        [1],
        {},
    ):
        assert refused_of(**{name: hostile}).field == name


@pytest.mark.parametrize(
    "literal", ["1" * 5000, "9" * 1_000_000, "-" + "9" * 41, "1e999", "NaN", "-Infinity", "1.5"]
)
def test_numbers_that_json_can_write_but_nobody_means_name_their_field(literal: str) -> None:
    assert refused({"data": f'{{"prompt": "a", "width": {literal}}}'.encode()}).field == "width"
    assert refused({"prompt": b"a", "width": literal.encode()}).field == "width"


@pytest.mark.parametrize(
    "part",
    [b"", b"abc", b"[1]", b"null1", b"0x20", b"true", b"[" * 100_000, b'{"a":1,"a":2}', b"\xff"],
)
def test_a_part_that_is_no_number_is_refused(part: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse({"prompt": b"a cat", "width": part})
    assert caught.value.field in ("width", "a")


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_texts_keep_to_their_length_and_are_text(name: str) -> None:
    assert getattr(of(**{name: "x" * 100}), name) == "x" * 100
    for value in (
        "x" * 101,
        "x" * 1_000_000,
        7,
        True,
        ["a"],
        {"a": "b"},
        "a\0b",
        "\ud800",
        "a\udfff",
    ):
        assert refused_of(**{name: value}).field == name
    assert refused({"prompt": b"a", name: b"\xff"}).field == name


def test_a_missing_prompt_is_refused() -> None:
    assert refused({"body": {}}).field == "prompt"
    assert refused({"body": {"prompt": None, "width": 64}}).field == "prompt"


@pytest.mark.parametrize("name", ["output_format", "response_format"])
@pytest.mark.parametrize("value", ["PNG", "bmp", "", 1, ["png"], {"png": 1}, True, "x" * 1_000_000])
def test_words_are_of_their_list(name: str, value: object) -> None:
    error = refused_of(**{name: value})
    assert error.field == name and "one of" in error.message


def test_a_refusal_never_quotes_a_prompt_or_an_image() -> None:
    secret = "the-merger-with-" + "x" * 300
    for fields in (
        {"prompt": secret},
        {"prompt": [secret]},
        {"image": secret},
        {"image": [secret]},
    ):
        assert "merger" not in str(refused_of(**fields))
    assert "a cat" not in repr(of(negative_prompt="a cat", image=CODED)) and "x01" not in repr(
        of(image=CODED)
    )


# --- images


@pytest.mark.parametrize(
    "wrap",
    [
        lambda coded: coded,
        lambda coded: f"data:image/png;base64,{coded}",
        lambda coded: f"DATA:;base64,{coded}",
        lambda coded: "\n".join(coded[at : at + 76] for at in range(0, len(coded), 76)) + "\r\n",
    ],
    ids=["bare", "data url", "bare data url", "wrapped lines"],
)
def test_images_come_in_base64(wrap: Callable[[str], str]) -> None:
    request = of(image=wrap(CODED), mask_image=wrap(CODED))
    assert request.image == request.mask_image == FILE and request.task == "inpainting"
    assert of(image=wrap(CODED)).task == "image-to-image"


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "data:image/png;base64,",
        "data:image/png,abcd",
        "ab*d",
        "abc",
        "abcde",
        "äbcd",
        "ab=d",
        "\ud800",
        7,
        True,
        [1],
        {},
    ],
)
def test_what_is_no_image_is_refused(value: object) -> None:
    assert refused_of(image=value).field == "image"
    assert refused_of(image=CODED, mask_image=value).field == "mask_image"


@settings(deadline=None)
@given(st.integers(1, 320))
def test_an_image_is_allowed_up_to_its_limit_to_the_byte(size: int) -> None:
    data = b"\1" * size
    for row in (
        {"body": {"prompt": "", "image": base64.b64encode(data).decode()}},
        {"prompt": b"", "image": data},
    ):
        if size <= LIMITS.max_image_bytes:
            assert parse(row).image == data
        else:
            assert refused(row).field == "image"


# --- what fields say together


def test_a_mask_needs_an_image() -> None:
    assert refused_of(mask_image=CODED).field == "mask_image"


def test_several_images_need_an_answer_that_holds_them() -> None:
    assert refused_of(num_images=2).field == "num_images"
    assert of(num_images=2, response_format="b64_json").num_images == 2


def test_a_task_that_is_not_served_is_refused() -> None:
    text, image = {"body": {"prompt": ""}}, {"body": {"prompt": "", "image": CODED}}
    mask = {"body": {"prompt": "", "image": CODED, "mask_image": CODED}}
    assert refused(text, tasks=("image-to-image",)).field == "image"
    assert refused(image, tasks=("text-to-image",)).field == "image"
    assert refused(mask, tasks=("text-to-image", "image-to-image")).field == "mask_image"
    assert parse(text, tasks=("text-to-image",)).task == "text-to-image"


def test_guidance_keeps_to_the_variant_that_is_warm() -> None:
    low, high = (
        {"body": {"prompt": "", "guidance_scale": 1}},
        {"body": {"prompt": "", "guidance_scale": 1.01}},
    )
    assert refused(low, guidance="on").field == "guidance_scale"
    assert refused(high, guidance="off").field == "guidance_scale"
    assert (
        parse(high, guidance="on").guidance_scale == 1.01
        and parse(low, guidance="off").guidance_scale == 1.0
    )


def test_strength_must_leave_a_step() -> None:
    assert refused_of(image=CODED, num_inference_steps=2, strength=0.49).field == "strength"
    assert refused_of(image=CODED, strength=5e-324).field == "strength"
    assert of(image=CODED, num_inference_steps=2, strength=0.5).strength == 0.5
    # no image, so it means nothing
    assert of(num_inference_steps=2, strength=0.49).strength == 0.49


def test_a_stream_is_asked_for_in_json_or_in_a_part_of_its_own() -> None:
    assert (of().stream, of().preview_every) == (False, 0)
    assert (of(stream=True, preview_every=3).preview_every, of(stream=None).stream) == (3, False)
    by_part = parse({"prompt": b"a", "stream": b"true", "preview_every": b"2"})
    assert (by_part.stream, by_part.preview_every) == (True, 2)
    no_flags: list[object] = [1, 0, "true", "yes", [], {}, 1.0]
    for wrong in no_flags:
        assert refused_of(stream=wrong).field == "stream"
    no_counts: list[object] = [-1, 51, True, 1.5, "1"]
    for wrong in no_counts:
        assert refused_of(stream=True, preview_every=wrong).field == "preview_every"
        assert refused_of(stream=True, num_previews=wrong).field == "num_previews"
    assert refused_of(preview_every=1).field == "preview_every"
    assert refused_of(num_previews=1).field == "num_previews"
    assert refused_of(stream=True, num_previews=1, preview_every=1).field == "num_previews"
    assert of(stream=True, num_images=2).num_images == 2, "every picture has an event of its own"


@given(num=st.integers(0, 20), of_steps=st.integers(1, 60))
def test_previews_are_as_many_as_asked_and_even(num: int, of_steps: int) -> None:
    request = of(stream=True, num_previews=num)
    shown = [step for step in range(1, of_steps + 1) if request.shows(step, of_steps)]
    assert len(shown) == min(num, of_steps - 1)
    gaps = [after - before for before, after in pairwise([0, *shown, of_steps])]
    assert max(gaps) - min(gaps) <= 1


def test_a_masks_channel_is_luminance_unless_it_is_alpha() -> None:
    file = base64.b64encode(b"file").decode()
    both: dict[str, object] = {"image": file, "mask_image": file}
    assert of(**both).mask_channel == "luminance"
    assert of(**both, mask_channel="alpha").mask_channel == "alpha"
    assert refused_of(**both, mask_channel="red").field == "mask_channel"
    assert refused_of(image=file, mask_channel="alpha").field == "mask_channel"


def test_compression_is_of_formats_that_lose_something() -> None:
    assert of().output_compression is None
    assert of(output_format="webp", output_compression=0).output_compression == 0
    assert of(output_format="png", output_compression=100).output_compression == 100
    wrong: list[object] = [-1, 101, "50", 1.5, True]
    for value in wrong:
        assert refused_of(output_format="jpeg", output_compression=value).field == (
            "output_compression"
        )
    assert refused_of(output_format="png", output_compression=50).field == "output_compression"


# --- anything at all

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.characters(categories=("Cs", "Cc")), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=30),
    "negative_prompt": st.text(max_size=30),
    "height": st.integers(0, 5000),
    "width": st.integers(0, 5000),
    "num_inference_steps": st.integers(0, 60),
    "guidance_scale": st.floats(-1, 60) | st.integers(0, 9),
    "seed": st.integers(-1, 2**63),
    "image": st.binary(max_size=320).map(lambda data: base64.b64encode(data).decode()),
    "mask_image": st.binary(max_size=320).map(lambda data: base64.b64encode(data).decode()),
    "strength": st.floats(0, 1.1),
    "num_images": st.integers(0, 5),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
    "response_format": st.sampled_from(["image", "b64_json", "url"]),
    "stream": st.booleans(),
    "preview_every": st.integers(0, 60),
    "num_previews": st.integers(0, 60),
    "mask_channel": st.sampled_from(["luminance", "alpha", "red"]),
    "output_compression": st.integers(-1, 101),
}
assert set(LIKELY) == set(FIELDS)
LEGAL_OR_NEARLY = st.fixed_dictionaries(
    {"prompt": st.text(max_size=30)},
    optional={name: likely for name, likely in LIKELY.items() if name != "prompt"},
)
HOSTILE = st.fixed_dictionaries(
    {}, optional={name: JSON | likely for name, likely in LIKELY.items()}
) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=4)
BYTES = st.binary(max_size=60) | st.text(max_size=30).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)
ROWS = (
    (LEGAL_OR_NEARLY | HOSTILE).flatmap(
        lambda body: st.sampled_from([{"body": body}, {"data": json.dumps(body).encode()}, body])
    )
    | st.dictionaries(
        st.sampled_from(("data", "body", *FIELDS)) | st.text(max_size=8), BYTES | JSON, max_size=5
    )
    | st.dictionaries(st.sampled_from(FIELDS), BYTES, max_size=6)
    | JSON
)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=100)
LEGAL = st.fixed_dictionaries(
    {"prompt": TEXT, "response_format": st.just("b64_json")},
    optional={
        "negative_prompt": TEXT,
        "height": st.integers(16, 4096),
        "width": st.integers(16, 4096),
        "num_inference_steps": st.integers(2, 50),
        "guidance_scale": st.floats(0, 50) | st.integers(0, 50),
        "seed": st.integers(0, 2**63 - 1),
        "image": st.binary(min_size=1, max_size=300),
        "strength": st.floats(0.5, 1) | st.just(1),
        "num_images": st.integers(1, 4),
        "output_format": st.sampled_from(["png", "jpeg", "webp"]),
    },
)


@settings(max_examples=500, deadline=None)
@given(LEGAL)
def test_a_legal_request_is_never_refused_and_never_changed(sent: dict[str, Any]) -> None:
    coded = {**sent, "image": base64.b64encode(sent["image"]).decode()} if "image" in sent else sent
    by_part = {
        name: value if name == "image" else str(value).encode() for name, value in sent.items()
    }
    for row in ({"body": coded}, {"data": json.dumps(coded).encode()}, by_part):
        request = parse(row)
        assert {name: getattr(request, name) for name in sent} == sent


@settings(max_examples=3000, deadline=None)
@given(ROWS)
@example({"body": {"prompt": "a", "seed": -0.0}})
@example({"data": memoryview(b'{"prompt": "a"}')})
@example({1: 2})
def test_whatever_the_row_it_is_a_legal_request_or_a_refusal_with_a_field(row: Any) -> None:
    try:
        request = parse(row)
    except RequestError as error:
        assert error.code == 400 and error.field and error.message
        json.dumps(error.body()).encode()
        return
    assert (
        len(request.prompt) <= 100
        and "\0" not in request.prompt
        and request.prompt.encode() is not None
    )
    for side in (request.height, request.width):
        assert side is None or (type(side) is int and 16 <= side <= 4096)
    assert type(request.num_inference_steps) is int and 1 <= request.num_inference_steps <= 50
    assert type(request.guidance_scale) is float and 0 <= request.guidance_scale <= 50
    assert type(request.seed) is int and 0 <= request.seed < NUM_SEEDS
    assert type(request.strength) is float and 0 < request.strength <= 1
    assert type(request.num_images) is int and 1 <= request.num_images <= 4
    assert request.num_images == 1 or request.response_format == "b64_json" or request.stream
    assert (
        type(request.stream) is bool
        and type(request.preview_every) is int
        and 0 <= request.preview_every <= 50
    )
    assert request.output_format in ("png", "jpeg", "webp") and request.response_format in (
        "image",
        "b64_json",
    )
    assert request.mask_image is None or request.image is not None
    for file in (request.image, request.mask_image):
        assert file is None or (type(file) is bytes and 1 <= len(file) <= 300)
