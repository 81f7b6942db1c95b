"""Write the golden datasets of this folder with the packages whose formats they are.

    python tests/loader/golden/make_golden.py FOLDER_OF_PEERS

FOLDER_OF_PEERS holds mosaicml-streaming 0.13 and litdata 0.2.76, installed with
`pip install --no-deps --target`, and what they import. `expected.json` says what is in the rows.
"""

import hashlib
import io
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROWS = 23


def image_bytes(number: int, kind: str) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def fact(value: object) -> object:
    """What expected.json keeps of a value."""
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return value


def rows() -> list[dict[str, object]]:
    draw = np.random.default_rng(0)
    return [
        {
            "text": "déjà vu " * (number % 4) + str(number),
            "number": number - 5,
            "score": number / 7,
            "raw": bytes(range(number)),
            "array": draw.normal(size=(number % 3 + 1, 4)).astype(np.float32),
        }
        for number in range(ROWS)
    ]


def write_mds() -> None:
    import transformers  # noqa: F401 - looks for torchvision before there is a stand-in for it

    # The package imports them; MDSWriter does not use them.
    for name, parts in (("", ()), (".datasets", ("VisionDataset", "ImageFolder")), (".transforms", ())):
        stand_in = types.ModuleType(f"torchvision{name}")
        stand_in.__path__ = []
        for part in parts:
            setattr(stand_in, part, type(part, (), {}))
        sys.modules.setdefault(stand_in.__name__, stand_in)
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.to_tensor = None  # type: ignore[attr-defined]
    sys.modules.setdefault(functional.__name__, functional)
    from streaming import MDSWriter

    columns = {
        "text": "str",
        "number": "int",
        "score": "float64",
        "raw": "bytes",
        "array": "ndarray",
        "fixed": "ndarray:uint16:2,3",
        "data": "json",
        "big": "str_int",
        "photo": "png",
        "small": "int8",
    }
    from PIL import Image

    for name, options in (
        ("mds-plain", {"hashes": ["sha1", "xxh64"]}),
        ("mds-zstd", {"compression": "zstd:7", "hashes": ["sha1"]}),
    ):
        with MDSWriter(columns=columns, out=str(HERE / name), size_limit=4096, **options) as writer:
            for row in rows():
                number = int(row["number"])  # type: ignore[call-overload]
                writer.write(
                    row
                    | {
                        "fixed": (np.arange(6).reshape(2, 3) + number + 5).astype(np.uint16),
                        "data": {"n": number, "list": [1, None, "x"]},
                        "big": 10**30 + number,
                        "photo": Image.open(io.BytesIO(image_bytes(number + 5, "png"))),
                        "small": np.int8(number),
                    }
                )


def write_litdata() -> None:
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    def write(name: str, items: list[object], **options: object) -> None:
        folder = HERE / name
        folder.mkdir()
        writer = BinaryWriter(str(folder), **options)  # type: ignore[arg-type]
        for index, item in enumerate(items):
            writer[index] = item
        writer.done()
        writer.merge()

    trees: list[object] = [
        row
        | {
            "tensor": torch.from_numpy(row["array"]) * 2,  # type: ignore[arg-type]
            "line": torch.arange(5) + index,
            "flag": index % 2 == 0,
        }
        for index, row in enumerate(rows())
    ]
    write("litdata-plain", trees, chunk_size=9)
    write("litdata-zstd-chunk", trees, chunk_size=9, compression="zstd", compression_level="chunk")
    write("litdata-zstd-batch", trees, chunk_size=9, compression="zstd", compression_batch_size=4)
    write("litdata-zstd-sample", trees, chunk_size=9, compression="zstd", compression_level="sample")
    write("litdata-tuple", [(index, f"text {index}") for index in range(ROWS)], chunk_size=9)
    write("litdata-nested", [{"a": index, "b": {"c": [1, index]}} for index in range(ROWS)], chunk_size=9)
    tokens: list[object] = [torch.arange(40, dtype=torch.int32) + 100 * index for index in range(6)]
    write("litdata-tokens", tokens, chunk_bytes=500, item_loader=TokensLoader(block_size=16))


def main() -> None:
    sys.path.append(sys.argv[1])
    for folder in HERE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            shutil.rmtree(folder)
    write_mds()
    write_litdata()
    kept = [{key: fact(value) for key, value in row.items()} for row in rows()]
    (HERE / "expected.json").write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
