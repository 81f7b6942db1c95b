"""Images: what Pillow makes of them by hand, the same chance on every worker, and no bomb gets in."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from marrow.core.errors import DataError, UsageError
from marrow.loader.formats.parquet import ParquetReader
from marrow.loader.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from marrow.loader.loader import Loader
from marrow.loader.samples import Collate


def photo(width: int, height: int, kind: str = "JPEG", seed: int = 0, mode: str = "RGB") -> bytes:
    """A smooth picture, as photographs are."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


def by_hand(data: bytes, size: int) -> Any:
    """Cut the middle square, scale it, normalise: plain Pillow and numpy."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box), np.float64)
    return ((pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("sides", [(64, 48), (48, 64), (33, 90), (16, 16)])
def test_the_middle_is_what_pillow_makes_by_hand(kind: str, sides: tuple[int, int]) -> None:
    data = photo(*sides, kind)
    found = ImageTransform(size=32, crop="center", flip=False)({"image": data}, 0)["image"]
    assert found.dtype == np.float32
    assert found.shape == (3, 32, 32)
    assert np.abs(found - by_hand(data, 32)).max() < 1e-5  # float32 of numbers up to 3


def test_a_large_jpeg_is_decoded_small_and_looks_the_same() -> None:
    data = photo(1600, 1200)
    found = ImageTransform(size=64, crop="center", flip=False)({"image": data}, 0)["image"]
    error = np.abs(found - by_hand(data, 64)) * 255 * 0.225  # in steps of 1 of 255
    assert error.mean() < 1.5
    assert error.max() < 12


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_other_colour_models_become_rgb(mode: str) -> None:
    found = ImageTransform(size=8, dtype="uint8")({"image": photo(20, 20, mode=mode)}, 0)["image"]
    assert (found.shape, found.dtype) == ((8, 8, 3), np.uint8)


def test_a_picture_with_a_palette_or_transparency_becomes_rgb() -> None:
    for mode in ("P", "LA", "RGBA"):
        data = photo(20, 20, "PNG", mode=mode)
        assert ImageTransform(size=8)({"image": data}, 0)["image"].shape == (3, 8, 8)


def test_chance_is_of_seed_and_position_alone() -> None:
    data = photo(90, 70)
    one, two = ImageTransform(size=16, seed=3), pickle.loads(pickle.dumps(ImageTransform(size=16, seed=3)))
    for position in (0, 1, 10**12):
        assert np.array_equal(
            one({"image": data}, position)["image"], two({"image": data}, position)["image"]
        )
    seen = {one({"image": data}, position)["image"].tobytes() for position in range(20)}
    assert len(seen) == 20
    other = ImageTransform(size=16, seed=4)({"image": data}, 0)["image"]
    assert not np.array_equal(other, one({"image": data}, 0)["image"])


def test_half_are_mirrored() -> None:
    data = photo(32, 32)
    transform = ImageTransform(size=32, crop="none", dtype="uint8")
    plain = ImageTransform(size=32, crop="none", flip=False, dtype="uint8")({"image": data}, 0)["image"]
    mirrored = 0
    for position in range(400):
        found = transform({"image": data}, position)["image"]
        is_mirrored = np.array_equal(found, plain[:, ::-1])
        assert is_mirrored or np.array_equal(found, plain)
        mirrored += is_mirrored
    assert 150 < mirrored < 250  # five standard deviations of a fair coin


def test_random_parts_keep_within_area_and_shape() -> None:
    transform = ImageTransform(crop="random")
    from marrow.loader.images import _Draw

    areas = []
    for position in range(500):
        left, top, right, bottom = transform._box(640, 480, _Draw(0, position))
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
        shape = (right - left) / (bottom - top)
        assert 3 / 4 - 1e-9 <= shape <= 4 / 3 + 1e-9
        areas.append((right - left) * (bottom - top) / (640 * 480))
    assert min(areas) < 0.15
    assert max(areas) > 0.85


def test_an_image_that_no_random_part_fits_is_cut_in_the_middle() -> None:
    assert ImageTransform(size=8)({"image": photo(500, 3)}, 0)["image"].shape == (3, 8, 8)


def test_hugging_faces_form_and_other_columns_are_kept() -> None:
    found = ImageTransform(size=8, column="img")({"img": {"bytes": photo(9, 9), "path": None}, "label": 4}, 0)
    assert (found["img"].shape, found["label"]) == ((3, 8, 8), 4)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (b"", "no image"),
        (b"hello", "no image"),
        (photo(40, 40)[:300], "no image"),
        (photo(40, 40, "PNG")[:-30], "no image"),
        (None, "NoneType"),
        ("path.jpg", "str"),
        ({"path": "x"}, "NoneType"),
    ],
)
def test_what_is_no_image_is_named(value: Any, word: str) -> None:
    with pytest.raises(DataError, match=word):
        ImageTransform(size=8)({"image": value}, 0)


@pytest.mark.slow
def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    for width, words in ((9_000, "9000 x 9000 pixels is more than the 64,000,000"), (14_000, "no image")):
        file = io.BytesIO()
        Image.new("1", (width, width)).save(file, "PNG")  # 30 kB that would be some 500 MB
        with pytest.raises(DataError, match=words):  # the second is refused by Pillow's own limit
            ImageTransform()({"image": file.getvalue()}, 0)
    with pytest.raises(DataError, match="more than the 100 allowed"):
        ImageTransform(max_pixels=100)({"image": photo(11, 11)}, 0)


def test_a_wrong_crop_or_column_is_named() -> None:
    with pytest.raises(UsageError, match="allowed are random"):
        ImageTransform(crop="diagonal")({"image": photo(9, 9)}, 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no column 'image'"):
        ImageTransform()({"photo": b""}, 0)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.parquet"
    images = [photo(40 + row % 7, 30 + row % 5, "PNG" if row % 2 else "JPEG", row) for row in range(40)]
    images[13] = b"not an image"
    images[21] = images[21][:60]
    pq.write_table(pa.table({"image": images, "label": list(range(40))}), path, row_group_size=8)
    return path


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_parquet_of_images_makes_equal_batches_and_counts_the_broken(parquet: Path, workers: int) -> None:
    collate = Collate(ImageTransform(size=16), "skip")

    def batches(workers: int) -> tuple[list[Any], dict[str, Any]]:
        with Loader(ParquetReader(parquet), 10, 0, collate=collate, workers=workers, stop=40) as loader:
            return [(one["image"].numpy().copy(), one["label"].tolist()) for one in loader], loader.counters()

    found, counters = batches(workers)
    expected, _ = batches(0)
    assert [labels for _, labels in found] == [labels for _, labels in expected]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(found, expected, strict=True))
    assert sorted(label for _, labels in found for label in labels) == sorted(set(range(40)) - {13, 21})
    assert counters["counts"]["samples skipped"] == 2
    assert any("row 13 of" in note for note in counters["notes"])


def test_a_broken_image_is_an_error_where_that_is_wanted(parquet: Path) -> None:
    with (
        Loader(ParquetReader(parquet), 40, 0, collate=Collate(ImageTransform(size=16))) as loader,
        pytest.raises(DataError, match=r"row (13|21) of .*images\.parquet.*no image"),
    ):
        next(loader)
