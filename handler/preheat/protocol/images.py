"""Pixels: client files in and out, and pictures laid in a bucket and cut from it as their plan
says.

Everything inside is 8-bit RGB (masks: one channel of luminance). Colour profiles are ignored on
purpose: the models were trained on pixels taken at face value, and what they generate carries no
profile either.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from preheat.errors import RequestError

OutputFormat = Literal["png", "jpeg", "webp"]
MaskChannel = Literal["luminance", "alpha"]

CONTENT_TYPES: Mapping[OutputFormat, str] = MappingProxyType(
    {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
)

_READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

# Measured on 1024x1024 pictures with the statistics of photos (1/f noise, hard edges, grain),
# Pillow 13 with zlib-ng, one x86-64 core; milliseconds and megabytes:
#   PNG   level 1: 95, 2.29   level 6 (the default): 135, 2.18   level 9: 135, 2.18
#         run lengths only: 63, 2.18
#         (on flat graphics run lengths are as fast as level 1, but 0.46 against 0.27)
#   JPEG  quality 92 with full colour: 5, 0.57   with halved colour: 3, 0.45
#   WebP  quality 90, method 0: 47, 0.40   method 2: 62, 0.39   method 4 (the default): 130, 0.40
_ENCODERS: Mapping[OutputFormat, Mapping[str, Any]] = MappingProxyType(
    {
        "png": {"format": "PNG", "compress_type": zlib.Z_RLE},
        "jpeg": {"format": "JPEG", "quality": 92, "subsampling": "4:4:4"},
        "webp": {"format": "WEBP", "quality": 90, "method": 2},
    }
)

_TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_JPEG_HEAD, _JPEG_SCAN = b"\xff\xd8\xff", b"\xff\xda"
# a progressive file has about 10; each one walks the whole picture, however few bytes it takes
_MAX_JPEG_SCANS = 100
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # TIFF tags


def decode(data: bytes, *, field: str, max_pixels: int) -> Image.Image:
    """The picture in a file a client sent, as RGB: upright by its EXIF, what is transparent laid
    over white.

    PNG, JPEG, WebP, BMP, GIF and TIFF are read; of an animation, the first frame. The size is
    checked before a pixel is decoded.

    Raises:
        RequestError: anything but a readable picture of at most `max_pixels` pixels, laid at
            `field`.
    """
    return _read(data, field, max_pixels, _over_white)


def decode_mask(
    data: bytes, *, field: str, max_pixels: int, channel: MaskChannel = "luminance"
) -> Image.Image:
    """The mask in a file a client sent, as L: white is to be repainted.

    By its luminance, whatever its alpha; or by its alpha, where what is transparent becomes white.

    Raises:
        RequestError: as `decode`; or by its alpha, and it has none.
    """
    if channel == "luminance":
        return _read(data, field, max_pixels, lambda image: _opaque(image).convert("L"))

    def transparency(image: Image.Image) -> Image.Image:
        if not _has_alpha(image):
            raise RequestError("has no alpha channel, which says what to repaint", field)
        return ImageChops.invert(image.convert("RGBA").getchannel("A"))

    return _read(data, field, max_pixels, transparency)


def encode(image: Image.Image, output_format: OutputFormat, quality: int | None = None) -> bytes:
    """The picture as a file: the same bytes for the same pixels.

    Args:
        quality: 0 to 100, of a JPEG or WebP; None: what the table above gives.
    """
    file = BytesIO()
    options = {} if quality is None or output_format == "png" else {"quality": quality}
    image.save(file, **{**_ENCODERS[output_format], **options})
    return file.getvalue()


def _read(
    data: bytes, field: str, max_pixels: int, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    try:
        image = _loaded(data, field, max_pixels)
        turn = _TURNS.get(_orientation(image))
        image = convert(image)
        if turn is not None:
            image = image.transpose(turn)
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(
            f"is not an image that can be read; send one of {', '.join(_READABLE)}", field
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(
            f"has too many pixels, at most {max_pixels} are allowed", field
        ) from None
    # Pillow's readers raise whatever a hostile file leads them to
    except Exception as error:  # noqa: BLE001
        reason = ascii(str(error) or type(error).__name__)[1:-1][:100]
        raise RequestError(f"cannot be decoded: {reason}", field) from None
    image.info = {}  # nothing of the client's metadata travels on
    return image


def _loaded(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """The file's first frame in the mode it is stored in, once its header is found harmless."""
    if data.startswith(_JPEG_HEAD) and data.count(_JPEG_SCAN) > _MAX_JPEG_SCANS:
        raise RequestError(f"is a JPEG of more than {_MAX_JPEG_SCANS} scans", field)
    image = Image.open(BytesIO(data), formats=_READABLE)
    _check_size(image.height, image.width, field, max_pixels)
    tags = getattr(image, "tag_v2", {})
    # a tile is decoded whole, however little of it shows
    if _TILE_WIDTH in tags and _TILE_HEIGHT in tags:
        _check_size(tags[_TILE_HEIGHT], tags[_TILE_WIDTH], field, max_pixels)
    image.load()
    _check_size(image.height, image.width, field, max_pixels)  # a GIF's frame may grow its screen
    return image


def _check_size(height: int, width: int, field: str, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise RequestError(
            f"is {height}x{width} (height x width); at most {max_pixels} pixels are allowed", field
        )


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation, asked after loading: the TIFF reader turns its pictures itself, and
    drops the tag.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  broken EXIF is common, and says nothing against the pixels
        return None


def _over_white(image: Image.Image) -> Image.Image:
    if not _has_alpha(image):
        return _opaque(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    keyed = "transparency" in image.info and not image.mode.startswith("I")
    return keyed or image.mode.endswith(("A", "a"))


def _opaque(image: Image.Image) -> Image.Image:
    """`image` as RGB, without regard to alpha."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    samples = np.asarray(image)  # (height, width): grey of 16 bits, or of 32
    if samples.dtype.kind == "f" or samples.min() < 0 or samples.max() > 65535:
        raise ValueError("samples of more than 16 bits; send 8 or 16")
    grey = (samples.astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
