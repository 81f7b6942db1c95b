"""Images a second, of one core: decoded, cropped at random, scaled to 224, normalised, in batches.

    python bench/images.py                 # in turns, medians; --rows, --repeats, --workers

Marrow's `ImageTransform` under its loader, beside a plain PyTorch DataLoader whose dataset does with
Pillow and numpy what users write: open, crop, resize, divide, subtract. Both read the same Parquet of
JPEGs, both in this process first (CPU time: what a core does), then with workers (wall time: what a
machine does; on two cores that also pay for the consumer). Two sizes of image: 500 x 375, as in
ImageNet, and 2000 x 1500, as from a camera. The pictures are made up: smooth, with noise.
"""

import argparse
import io
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from marrow.loader.formats.parquet import ParquetReader
from marrow.loader.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from marrow.loader.loader import Loader
from marrow.loader.samples import Collate

BATCH, SIZE = 16, 224
SIZES = {"500x375": (500, 375), "2000x1500": (2000, 1500)}
RESULTS = Path(__file__).parent / "results" / "images.json"


def write_images(folder: Path, name: str, rows: int) -> Path:
    """Write Parquet of JPEGs of one size; ten different pictures in turns."""
    width, height = SIZES[name]
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(min(rows, 10)):
        small = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + draw.integers(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        pictures.append(file.getvalue())
    path = folder / f"{name}.parquet"
    images = [pictures[row % len(pictures)] for row in range(rows)]
    pq.write_table(pa.table({"image": images, "label": list(range(rows))}), path, row_group_size=64)
    return path


class Plain(Dataset[Any]):
    """What users write: every image in full, cut, scaled and normalised."""

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path)
        self.images, self.labels = table.column("image").to_pylist(), table.column("label").to_pylist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(io.BytesIO(self.images[index])).convert("RGB")
        width, height = image.size
        area = width * height * random.uniform(0.08, 1)
        shape = math.exp(random.uniform(-math.log(4 / 3), math.log(4 / 3)))
        wide = min(width, round(math.sqrt(area * shape)))
        high = min(height, round(math.sqrt(area / shape)))
        left, top = random.randint(0, width - wide), random.randint(0, height - high)
        image = image.crop((left, top, left + wide, top + high))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (pixels - mean) / std, self.labels[index]


def ours(path: Path, workers: int) -> Iterator[Any]:
    """Open Marrow's loader on one epoch."""
    reader = ParquetReader(path)
    loader = Loader(
        reader,
        BATCH,
        0,
        collate=Collate(ImageTransform(SIZE)),
        workers=workers,
        prefetch=2 if workers else 0,
        stop=reader.num_rows,
    )
    with loader:
        yield from loader


def theirs(path: Path, workers: int) -> Iterator[Any]:
    """Open a DataLoader on one epoch."""
    yield from DataLoader(Plain(path), BATCH, shuffle=True, num_workers=workers)


def rate(open_batches: Callable[[], Iterator[Any]], clock: Callable[[], float], skipped: int) -> float:
    """Return images a second by a clock, after some batches in which workers start."""
    batches = open_batches()
    for _ in range(skipped):
        next(batches)
    start_s, count = clock(), 0
    for batch in batches:
        count += len(batch["image"] if isinstance(batch, dict) else batch[0])
    return count / (clock() - start_s)


def main() -> None:
    """Measure in turns, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--rows", type=int, default=256, help="of the smaller images; of the larger half as many"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    if given.rows // 2 <= (given.workers + 1) * BATCH:
        parser.error(
            f"--rows {given.rows}: more than {2 * (given.workers + 1) * BATCH} leave some to measure"
        )
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SIZES:
            path = write_images(Path(folder), name, given.rows if name == "500x375" else given.rows // 2)
            for workers, clock in ((0, time.process_time), (given.workers, time.perf_counter)):
                rates: dict[str, list[float]] = {"marrow": [], "DataLoader": []}
                for _ in range(given.repeats):
                    rates["marrow"].append(rate(lambda p=path, w=workers: ours(p, w), clock, workers + 1))
                    rates["DataLoader"].append(
                        rate(lambda p=path, w=workers: theirs(p, w), clock, workers + 1)
                    )
                medians = {way: statistics.median(values) for way, values in rates.items()}
                results.append(
                    {
                        "image": name,
                        "workers": workers,
                        "clock": "CPU" if clock is time.process_time else "wall",
                        "images_per_s": medians,
                        "ratio": medians["marrow"] / medians["DataLoader"],
                    }
                )
    print(f"{'image':10} {'workers':>7} {'clock':>5} {'marrow':>9} {'DataLoader':>11} {'ratio':>6}  images/s")
    for line in results:
        shown = line["images_per_s"]
        print(
            f"{line['image']:10} {line['workers']:7} {line['clock']:>5} {shown['marrow']:9.0f} "
            f"{shown['DataLoader']:11.0f} {line['ratio']:6.2f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"command": "python bench/images.py", "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
