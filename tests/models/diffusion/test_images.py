"""Pixels in and out: files as clients send them, pictures laid in buckets and cut from them."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from preheat.buckets import Bucket
from preheat.config.pt2 import Fit, Oversize
from preheat.errors import RequestError
from preheat.models.diffusion.geometry import Plan, pad_into, plan, resize_into
from preheat.models.diffusion.image_processor import finish, fit_to, place
from preheat.models.diffusion.request import OUTPUT_FORMATS
from preheat.protocol.images import CONTENT_TYPES, OutputFormat, decode, decode_mask, encode

MAX_PIXELS = 1_000_000
RED, WHITE = (255, 0, 0), (255, 255, 255)

BUCKETS = (Bucket(64, 64), Bucket(96, 48), Bucket(48, 96))
sides = st.integers(1, 150)


def noise(height: int, width: int, *channels: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def same(image: Image.Image, pixels: NDArray[np.uint8]) -> bool:
    return np.array_equal(np.asarray(image), pixels)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    return decode(data, field="image", max_pixels=max_pixels)


def refused(data: bytes, max_pixels: int = MAX_PIXELS) -> RequestError:
    for reader in (decode, decode_mask):
        with pytest.raises(RequestError) as caught:
            reader(data, field="mask_image", max_pixels=max_pixels)
        assert (
            caught.value.field == "mask_image"
            and caught.value.code == 400
            and str(caught.value).isprintable()
        )
    return caught.value


# --- laying and cutting


@settings(max_examples=400, deadline=None)
@given(
    sides, sides, st.sampled_from(get_args(Fit)), st.sampled_from(get_args(Oversize)), st.booleans()
)
def test_the_output_is_exactly_what_was_asked_for(
    height: int, width: int, fit: Fit, oversize: Oversize, has_image: bool
) -> None:
    try:
        made = plan(
            height,
            width,
            buckets=BUCKETS,
            fit=fit,
            oversize=oversize,
            multiple=8,
            has_image=has_image,
        )
    except RequestError:
        assert fit != "resize" and oversize == "reject"
        return
    if has_image:
        for image in (
            Image.fromarray(noise(height, width, 3)),
            Image.fromarray(noise(height, width)),
        ):
            laid = place(image, made)
            assert laid.size == (made.bucket.width, made.bucket.height) and laid.mode == image.mode
    picture = finish(noise(made.bucket.height, made.bucket.width, 3), made)
    assert picture.size == (width, height) and picture.mode == "RGB"


@settings(max_examples=400, deadline=None)
@given(sides, sides, st.integers(0, 99), st.booleans())
def test_cutting_undoes_laying_to_the_byte(
    height: int, width: int, seed: int, has_image: bool
) -> None:
    image = Image.fromarray(noise(height, width, 3, seed=seed))
    made = plan(
        height,
        width,
        buckets=BUCKETS,
        fit="pad",
        oversize="eager",
        multiple=8,
        has_image=has_image,
    )
    back = finish(np.asarray(place(image, made)), made)
    assert back.size == image.size and back.tobytes() == image.tobytes()


def test_a_picture_of_its_buckets_size_is_neither_moved_nor_resampled() -> None:
    pixels = noise(96, 48, 3)
    for fit in get_args(Fit):
        made = plan(96, 48, buckets=BUCKETS, fit=fit, oversize="reject", multiple=8, has_image=True)
        assert same(place(Image.fromarray(pixels), made), pixels)
        assert same(finish(pixels, made), pixels)


def test_edges_are_continued_to_the_right_and_down() -> None:
    pixels = noise(40, 30, 3)
    laid = np.asarray(
        place(Image.fromarray(pixels), pad_into(Bucket(64, 64), 40, 30, has_image=True))
    )
    assert np.array_equal(laid[:40, :30], pixels)
    assert np.array_equal(laid[:40, 30:], np.repeat(pixels[:, -1:], 34, axis=1))
    assert np.array_equal(laid[40:], np.repeat(laid[39:40], 24, axis=0))


def test_edges_are_continued_to_all_sides_where_the_image_lies_in_the_middle() -> None:
    made = resize_into(Bucket(64, 64), 64, 32)
    assert made.image_size == (64, 32) and made.image_at == (0, 16)
    pixels = noise(64, 32)
    laid = np.asarray(place(Image.fromarray(pixels), made))
    assert np.array_equal(laid, np.pad(pixels, ((0, 0), (16, 16)), mode="edge"))


def cut_after_resampling(pixels: NDArray[np.uint8], made: Plan) -> NDArray[np.uint8]:
    scaled = Image.fromarray(pixels).resize(
        (made.scaled[1], made.scaled[0]), Image.Resampling.LANCZOS
    )
    return np.asarray(scaled)[made.crop.top : made.crop.bottom, made.crop.left : made.crop.right]


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.sampled_from(BUCKETS))
def test_finish_is_resampling_to_scaled_and_cutting_the_crop(
    height: int, width: int, bucket: Bucket
) -> None:
    made = resize_into(bucket, height, width)
    # Mid greys, since Pillow clips between its two passes and takes them in whichever order is
    # cheaper for the box.
    pixels = noise(bucket.height, bucket.width, 3) // 4 + 96
    difference = np.asarray(finish(pixels, made)).astype(int) - cut_after_resampling(pixels, made)
    assert np.abs(difference).max() <= 2


@settings(max_examples=200, deadline=None)
@given(st.integers(24, 150), st.integers(24, 150), st.sampled_from(BUCKETS))
def test_what_is_painted_over_an_image_comes_out_where_it_was(
    height: int, width: int, bucket: Bucket
) -> None:
    made = resize_into(bucket, height, width)
    ramps = np.zeros((height, width, 3))  # green tells the row, red the column
    ramps[..., 0], ramps[..., 1] = np.arange(width), np.arange(height)[:, None]
    back = np.asarray(
        finish(np.asarray(place(Image.fromarray(ramps.astype(np.uint8)), made)), made)
    )
    # Both ends of the laid rectangle are rounded by half a bucket pixel at most; that is what an
    # inner pixel may move.
    moved = np.abs(back.astype(int) - ramps)[4:-4, 4:-4]
    for channel, (scaled, side) in enumerate(
        ((made.scaled[1], made.bucket.width), (made.scaled[0], made.bucket.height))
    ):
        assert moved[..., channel].max() <= scaled / side / 2 + 1.5


def test_lay_and_finish_take_only_what_the_plan_is_for() -> None:
    made = pad_into(Bucket(64, 64), 40, 30, has_image=True)
    with pytest.raises(ValueError, match="30x40"):
        place(Image.new("RGB", (40, 30)), made)
    for pixels in (noise(40, 30, 3), noise(64, 64), noise(64, 64, 3).astype(np.float32)):
        with pytest.raises(ValueError, match="generated"):
            finish(pixels, made)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(sides, sides, sides, sides, st.sampled_from(["RGB", "L"]))
def test_fit_to_gives_exactly_the_size(
    height: int, width: int, to_height: int, to_width: int, mode: str
) -> None:
    fitted = fit_to(Image.new(mode, (width, height), "white"), to_height, to_width)
    assert fitted.size == (to_width, to_height) and fitted.mode == mode
    assert fitted.getextrema() == (((255, 255),) * 3 if mode == "RGB" else (255, 255))


def test_fit_to_keeps_the_middle_and_the_proportions() -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 200
    assert same(fit_to(Image.fromarray(pixels), 40, 40), pixels[:, 40:80])
    assert fit_to(Image.fromarray(pixels), 20, 20).getpixel((10, 10)) == (200, 200, 200)
    image = Image.fromarray(pixels)
    assert fit_to(image, 40, 120) is image


@pytest.mark.parametrize("size", [(1, 900_000), (900_000, 1)])
def test_a_sliver_is_not_blown_up_on_its_way(size: tuple[int, int]) -> None:
    # scaled to cover it would have 10**11 pixels
    assert fit_to(Image.new("RGB", size), 512, 512).size == (512, 512)


# --- files in


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_files_are_read_to_the_byte(format: str) -> None:
    pixels = noise(13, 17, 3)
    image = read(file_of(Image.fromarray(pixels), format))
    assert image.mode == "RGB" and same(image, pixels)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"]
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_mode_that_a_file_can_hold_is_read_as_rgb_and_as_a_mask(
    mode: str, format: str
) -> None:
    try:
        data = file_of(Image.new(mode, (5, 3)), format)
    except (OSError, ValueError):
        return  # a format does not hold every mode
    assert (read(data).mode, read(data).size) == ("RGB", (5, 3))
    mask = decode_mask(data, field="mask_image", max_pixels=MAX_PIXELS)
    assert (mask.mode, mask.size) == ("L", (5, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_what_is_transparent_is_white(mode: str, format: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    data = file_of(
        image.convert(mode),
        format,
        **({"lossless": True, "exact": True} if format == "WEBP" else {}),
    )
    assert [read(data).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]


def test_half_transparent_is_half_white() -> None:
    assert read(file_of(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).getpixel((0, 0)) == (
        127,
        127,
        127,
    )


@pytest.mark.parametrize(
    ("mode", "key"), [("L", 0), ("RGB", (0, 0, 0)), ("P", 0), ("P", b"\0")], ids=str
)
def test_a_transparent_colour_is_white(mode: str, key: Any) -> None:
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), RED if mode == "RGB" else 1)
    data = file_of(image, transparency=key)
    assert read(data).getpixel((0, 0)) == WHITE and read(data).getpixel((1, 0)) != WHITE


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str) -> None:
    samples = np.array([[0, 128, 129, 32896, 65407, 65535]], np.uint16)
    image = read(file_of(Image.fromarray(samples), format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize(
    "samples",
    [np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32), np.ones((2, 2), np.float32)],
)
def test_samples_without_a_known_white_are_refused(samples: Any) -> None:
    assert "16 bits" in refused(file_of(Image.fromarray(samples), "TIFF")).message


def test_cmyk_is_read_in_its_colours() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for format in ("JPEG", "TIFF"):
        pixel = np.asarray(read(file_of(red, format)))[4, 4].astype(int)
        assert np.abs(pixel - RED).max() <= 3


UPRIGHT = np.array([[RED, (0, 255, 0), (0, 0, 255)], [WHITE, (0, 0, 0), (99, 99, 99)]], np.uint8)
# how a camera stores a picture that is UPRIGHT once turned
STORED: dict[int, Callable[[Any], Any]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[::-1],
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_upright_by_their_exif(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    data = file_of(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert same(read(data), UPRIGHT)
    luminance = decode_mask(data, field="mask_image", max_pixels=MAX_PIXELS)
    assert same(luminance, np.asarray(Image.fromarray(UPRIGHT).convert("L")))


def test_a_jpeg_from_a_phone_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(file_of(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_exif_says_nothing_against_the_pixels(exif: bytes, format: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read(file_of(Image.new("RGB", (20, 10)), format, exif=exif)).size == (20, 10)


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert read(data).getpixel((0, 0)) == RED


def test_a_mask_is_luminance_whatever_its_alpha() -> None:
    drawn = Image.new("RGBA", (2, 1), (0, 0, 0, 0))  # a canvas: strokes in white on nothing
    drawn.putpixel((1, 0), (255, 255, 255, 255))
    mask = decode_mask(file_of(drawn), field="mask_image", max_pixels=MAX_PIXELS)
    assert mask.mode == "L" and mask.tobytes() == b"\x00\xff"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_by_its_alpha_a_mask_is_what_is_transparent(mode: str, format: str) -> None:
    """White where it is opaque, which by luminance would be repainted."""
    drawn = Image.new("RGBA", (3, 1), (255, 255, 255, 255))
    drawn.putpixel((0, 0), (255, 255, 255, 0))
    drawn.putpixel((1, 0), (255, 255, 255, 200))
    data = file_of(drawn.convert(mode), format, lossless=True)
    mask = decode_mask(data, field="mask_image", max_pixels=MAX_PIXELS, channel="alpha")
    assert mask.mode == "L" and list(mask.tobytes()) == [255, 55, 0]


def test_a_palettes_transparent_colour_is_alpha_too() -> None:
    drawn = Image.new("P", (2, 1), 1)
    drawn.putpixel((0, 0), 0)
    mask = decode_mask(
        file_of(drawn, transparency=0), field="m", max_pixels=MAX_PIXELS, channel="alpha"
    )
    assert list(mask.tobytes()) == [255, 0]


def test_a_mask_without_alpha_says_nothing_by_it() -> None:
    for mode in ("L", "RGB", "P", "I;16"):
        with pytest.raises(RequestError, match="mask_image has no alpha channel"):
            decode_mask(
                file_of(Image.new(mode, (2, 1))),
                field="mask_image",
                max_pixels=MAX_PIXELS,
                channel="alpha",
            )


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_file_is_as_small_as_its_quality_allows(output_format: OutputFormat) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    sizes = [len(encode(picture, output_format, quality)) for quality in (0, 30, 100)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert encode(picture, "png", 30) == encode(picture, "png")


def test_metadata_stays_behind() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = read(file_of(Image.new("RGB", (8, 8)), icc_profile=profile, dpi=(72, 72)))
    assert image.info == {}
    for output_format in OUTPUT_FORMATS:
        assert not set(Image.open(BytesIO(encode(image, output_format))).info) & {
            "icc_profile",
            "exif",
            "dpi",
        }


# --- hostile files


def png(height: int, width: int) -> bytes:
    """A PNG whose header says height x width, and nothing behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def tiff_with_tiles_of(side: int) -> bytes:
    """A 16x16 TIFF, deflated, in tiles of side x side."""
    data = zlib.compress(bytes(256))
    tags = {
        256: 16,
        257: 16,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: side,
        323: side,
        324: 0,
        325: len(data),
    }
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


@pytest.mark.parametrize(
    ("height", "width"),
    [(50_000, 50_000), (10_000, 10_000), (1001, 1000), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1)],
)
def test_a_bomb_is_refused_by_its_header(height: int, width: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert f"at most {MAX_PIXELS}" in refused(png(height, width)).message


def test_the_limit_is_met_to_the_pixel() -> None:
    data = file_of(Image.new("L", (100, 100)))
    assert read(data, 10_000).size == (100, 100)
    assert "100x100" in refused(data, 9_999).message


def test_a_bomb_in_the_tiles_is_refused() -> None:
    assert read(tiff_with_tiles_of(16)).size == (16, 16)
    assert "30000x30000" in refused(tiff_with_tiles_of(30_000)).message


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = file_of(Image.fromarray(noise(64, 64, 3)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert read(data[:-2] + 20 * last + data[-2:]).size == (64, 64)
    assert "scans" in refused(data[:-2] + 1000 * last + data[-2:]).message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_refused(format: str, keep: float) -> None:
    data = file_of(Image.fromarray(noise(64, 64, 3)), format)
    refused(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"not an image",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF89a",
        b"\xff\xd8\xff",
        png(0, 9),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    refused(data)


def test_formats_that_are_not_offered_are_refused() -> None:
    image = Image.new("RGB", (8, 8))
    for format in ("PPM", "TGA", "PCX", "ICO", "EPS", "JPEG2000"):
        assert "send one of PNG" in refused(file_of(image, format)).message


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), KeyError(7), struct.error("a\nb\x1b[31m" * 99)]
)
def test_whatever_a_reader_raises_is_said_on_one_short_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    message = refused(file_of(Image.new("RGB", (8, 8)))).message
    assert (
        message.startswith("cannot be decoded: ")
        and len(message) <= 120
        and not message.endswith(" ")
    )


SEEDS = [
    file_of(Image.fromarray(noise(9, 11, channels)), format, **options)
    for format, channels, options in (
        ("PNG", 3, {}),
        ("PNG", 4, {}),
        ("JPEG", 3, {"progressive": True}),
        ("WEBP", 4, {}),
        ("WEBP", 3, {"lossless": True}),
        ("BMP", 3, {}),
        ("GIF", 3, {}),
        ("TIFF", 3, {"compression": "tiff_lzw"}),
        ("TIFF", 4, {"compression": "tiff_deflate"}),
    )
] + [
    png(9, 11),
    tiff_with_tiles_of(16),
    file_of(Image.new("I;16", (9, 9)), "TIFF"),
    file_of(Image.new("P", (9, 9))),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for at, value in draw(
        st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=6)
    ):
        data[at] = value
    start = draw(st.just(0) | st.integers(0, len(data)))
    return bytes(data[: len(data) - start]) + draw(st.binary(max_size=8))


@settings(max_examples=1500, deadline=None)
@given(damaged() | st.binary(max_size=64))
def test_whatever_the_bytes_it_is_a_picture_or_a_refusal(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for reader, mode in ((decode, "RGB"), (decode_mask, "L")):
            try:
                image = reader(data, field="image", max_pixels=100_000)
            except RequestError as error:
                assert error.field == "image" and str(error).isprintable()
            else:
                assert image.mode == mode and 1 <= image.width * image.height <= 100_000


# --- files out


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_a_picture_is_encoded_as_what_its_content_type_says(output_format: OutputFormat) -> None:
    image = Image.fromarray(noise(33, 57, 3)).resize((57, 33), Image.Resampling.LANCZOS)
    data = encode(image, output_format)
    back = Image.open(BytesIO(data))
    assert Image.MIME[back.format or ""] == CONTENT_TYPES[output_format]
    assert back.size == (57, 33) and back.mode == "RGB"
    assert encode(image, output_format) == data


@settings(max_examples=50, deadline=None)
@given(sides, sides)
def test_png_keeps_every_byte(height: int, width: int) -> None:
    pixels = noise(height, width, 3)
    assert same(read(encode(Image.fromarray(pixels), "png")), pixels)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_stay_close(output_format: OutputFormat) -> None:
    down, across = np.mgrid[:128, :128]
    smooth = (
        np.stack([across * 2, down * 2, 255 - across - down], axis=-1).clip(0, 255).astype(np.uint8)
    )
    difference = (
        np.asarray(read(encode(Image.fromarray(smooth), output_format))).astype(int) - smooth
    )
    assert np.abs(difference).mean() < 2


def test_jpeg_keeps_its_colour_at_full_resolution() -> None:
    data = encode(Image.new("RGB", (16, 16)), "jpeg")
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x11  # sampling of the first component: 1x1, as the others
