"""Images as samples: JPEG and PNG bytes -> resized, cropped, normalised float32 or uint8 arrays.

    transform = ImageTransform(size=224, crop="random", flip=True, seed=0)
    Loader(ParquetReader("images.parquet"), 64, seed=0, collate=Collate(transform), workers=2)

A JPEG that is larger than wanted is decoded at 1/2, 1/4 or 1/8 of its size (the inverse cosine
transform of fewer coefficients), which is most of the work saved; nothing smaller than the target
is ever made. Chance (crop, flip) is a function of (seed, position), so a sample looks the same
on any number of workers and after a resume, and differently in the next epoch. Pillow, no torchvision.

Axes: H height, W width, C channels.
"""

import hashlib
import io
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from marrow.core.errors import DataError, UsageError
from marrow.loader.samples import Sample

Crop = Literal["random", "center", "none"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64_000_000  # of the file, before anything is decoded; a bomb claims more
_RESIZE_SLACK = 1.15  # a decode in draft mode may be this much nearer to the target than plain resizing


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Decodes the image of a sample. Picklable; called as transform(sample, position).

    size: side of the square that comes out, in pixels. crop: "random" takes a part of 8 to 100 % of
    the area and a shape of 3:4 to 4:3, as ImageNet training does; "center" scales the short side
    to `size` and cuts the middle; "none" scales both sides. flip: mirror half of the samples.
    dtype: "float32" is (x / 255 - mean) / std in [C, H, W]; "uint8" is [H, W, C] as decoded, to be
    normalised on the device. column: where the bytes are, plain or as Hugging Face's {"bytes": ...};
    the result takes its place. max_pixels: larger images are refused before they are decoded.
    """

    size: int = 224
    crop: Crop = "random"
    flip: bool = True
    seed: int = 0
    dtype: Literal["float32", "uint8"] = "float32"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    column: str = "image"
    max_pixels: int = MAX_PIXELS

    def __call__(self, sample: Sample, position: int) -> Sample:
        """Return the sample with its image as an array.

        Raises: DataError for bytes that are no image, or are one of too many pixels.
        """
        if self.column not in sample:
            raise DataError(f"there is no column {self.column!r}", hint=f"columns are {', '.join(sample)}")
        data = sample[self.column]
        if isinstance(data, dict):
            data = data.get("bytes")
        if not isinstance(data, bytes | bytearray | memoryview):
            raise DataError(f"the image is a {type(data).__name__}, not bytes", hint="store the file's bytes")
        pixels_HWC = self.decode(data, position)
        array = pixels_HWC if self.dtype == "uint8" else self.normalise(pixels_HWC)
        return {**sample, self.column: array}

    def decode(self, data: Any, position: int) -> NDArray[np.uint8]:
        """Decode, crop, scale and mirror: uint8 [size, size, 3]."""
        Image = _pillow()
        draw = _Draw(self.seed, position)
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise DataError(
                        f"an image of {width} x {height} pixels is more than the {self.max_pixels:,} allowed",
                        hint="raise max_pixels if this is no attack on your memory",
                    )
                box = self._box(width, height, draw)
                wanted = self.size * _RESIZE_SLACK
                factor = min((box[2] - box[0]) / wanted, (box[3] - box[1]) / wanted)
                if factor >= 2:  # JPEG only; other formats ignore it
                    image.draft("RGB", (int(width / factor), int(height / factor)))
                    shrunk = image.size[0] / width, image.size[1] / height
                    box = box[0] * shrunk[0], box[1] * shrunk[1], box[2] * shrunk[0], box[3] * shrunk[1]
                made = image.convert("RGB").resize(
                    (self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0
                )
        except DataError:
            raise
        except _broken(Image) as error:
            raise DataError(
                f"the {len(data):,} bytes are no image that can be decoded: {error}",
                hint='on_error="skip" leaves broken images out and counts them',
            ) from error
        pixels_HWC = np.asarray(made)
        return pixels_HWC[:, ::-1] if self.flip and draw.uniform() < 0.5 else pixels_HWC

    def normalise(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (x / 255 - mean) / std as float32 [C, H, W]."""
        scale = (1 / (255 * np.array(self.std))).astype(np.float32)
        shift = (np.array(self.mean) / np.array(self.std)).astype(np.float32)
        out = np.empty((3, self.size, self.size), dtype=np.float32)
        for channel in range(3):  # PERF: half the time of one strided pass over [H, W, C]
            np.multiply(pixels_HWC[..., channel], scale[channel], out=out[channel])
            out[channel] -= shift[channel]
        return out

    def _box(self, width: int, height: int, draw: "_Draw") -> tuple[float, float, float, float]:
        """Choose the part of the image that is kept: left, top, right, bottom in its pixels."""
        if self.crop == "none":
            return 0.0, 0.0, float(width), float(height)
        if self.crop == "center":
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return left, top, left + side, top + side
        if self.crop != "random":
            raise UsageError(f"crop = {self.crop!r}; allowed are random, center and none")
        for _ in range(10):
            area = width * height * (0.08 + 0.92 * draw.uniform())
            shape = math.exp((2 * draw.uniform() - 1) * math.log(4 / 3))
            wide, high = math.sqrt(area * shape), math.sqrt(area / shape)
            if wide <= width and high <= height:
                left, top = draw.uniform() * (width - wide), draw.uniform() * (height - high)
                return left, top, left + wide, top + high
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side


class _Draw:
    """Numbers in [0, 1) that depend on (seed, position) alone: 64 bits each of a BLAKE2b stream."""

    def __init__(self, seed: int, position: int) -> None:
        self._key = f"marrow image {seed} {position} "
        self._block = b""
        self._blocks = 0

    def uniform(self) -> float:
        """Return the next one. Cost: about 1 microsecond."""
        if not self._block:
            self._block = hashlib.blake2b(f"{self._key}{self._blocks}".encode()).digest()
            self._blocks += 1
        number, self._block = int.from_bytes(self._block[:8], "little"), self._block[8:]
        return (number >> 11) / (1 << 53)


def _broken(pillow: Any) -> tuple[type[BaseException], ...]:
    """Return what Pillow raises for bytes that it cannot decode.

    Its warning of too many pixels is there for programs in which warnings are errors.
    """
    bombs = pillow.DecompressionBombError, pillow.DecompressionBombWarning
    return OSError, ValueError, SyntaxError, EOFError, *bombs


def _pillow() -> Any:
    try:
        from PIL import Image  # an extra; and nothing else in the loader needs it
    except ImportError as error:
        raise UsageError(
            "decoding images needs Pillow, which is not installed", hint="pip install 'marrow[images]'"
        ) from error
    return Image
