"""The loaders that Marrow's is measured against, each used as its own documentation says.

All read the same packed rows, shuffled, and give int64 tensors [B, T+1] in one process: what a
training loop gets inputs and targets from as views. What each needs on disk is written from one
flat file, so the rows are equal; `bench/loader.py` checks that.
"""

import importlib.abc
import importlib.machinery
import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

PEERS = Path(__file__).resolve().parents[2] / ".bench" / "loader"
Batches = Iterator[torch.Tensor]


class _Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for torchvision, which one peer imports for its images; tokens do not need it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Answer for torchvision alone."""
        wanted = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module any class that is asked for."""
        module.__path__ = []
        module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]


def find_peers() -> None:
    """Let the peers be imported."""
    sys.path.append(str(PEERS))
    try:
        import torchvision  # noqa: F401
    except ImportError:
        sys.meta_path.append(_Stub())


def read_flat(folder: Path) -> np.ndarray:
    """Map the flat file: uint16 [rows, T+1]."""
    stored = int((folder / "stored").read_text())
    return np.memmap(folder / "flat.bin", dtype=np.uint16, mode="r").reshape(-1, stored)


def write_for_peers(folder: Path) -> None:
    """Write the flat file's rows in each peer's format."""
    rows = read_flat(folder)
    find_peers()
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # what a run of it that was killed left behind stops the next one
    _write_litdata(folder / "litdata", rows)
    _write_mds(folder / "mds", rows)
    _write_tars(folder / "tars", rows)
    _write_huggingface(folder / "huggingface", rows)


def memmap(folder: Path, batch: int) -> Batches:
    """Take rows of the flat file by a precomputed permutation."""
    rows = read_flat(folder)
    while True:
        order = np.random.default_rng(0).permutation(len(rows))
        for i in range(0, len(order) - batch + 1, batch):
            yield torch.from_numpy(rows.take(order[i : i + batch], axis=0).astype(np.int64))


def arrow_mmap(folder: Path, batch: int) -> Batches:
    """Do by hand what the format allows: mapped Arrow files, one numpy gather for each shard."""
    shards = []
    for path in sorted((folder / "marrow").glob("*.arrow")):
        column = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column("tokens")
        shards.append(column.flatten().to_numpy().reshape(len(column), -1))
    firsts = np.cumsum([0, *map(len, shards)])
    while True:
        order = np.random.default_rng(0).permutation(firsts[-1])
        for i in range(0, len(order) - batch + 1, batch):
            wanted = order[i : i + batch]
            shard_of = np.searchsorted(firsts, wanted, side="right") - 1
            out = np.empty((batch, shards[0].shape[1]), dtype=np.int64)
            for index in np.unique(shard_of):
                here = shard_of == index
                out[here] = shards[index][wanted[here] - firsts[index]]
            yield torch.from_numpy(out)


class MemmapRows(Dataset[torch.Tensor]):
    """Rows of the flat file, one at a time, as PyTorch wants them."""

    def __init__(self, folder: Path) -> None:
        self.rows = read_flat(folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index].astype(np.int64))


def dataloader(folder: Path, batch: int, workers: int = 0) -> Batches:
    """Give what PyTorch's DataLoader gives over the flat file."""
    rows = MemmapRows(folder)
    while True:
        yield from DataLoader(rows, batch, shuffle=True, drop_last=True, num_workers=workers)


def dataloader_worker(folder: Path, batch: int) -> Batches:
    """Do as `dataloader`, with one worker process."""
    return dataloader(folder, batch, 1)


def litdata(folder: Path, batch: int) -> Batches:
    """Stream blocks of tokens with litdata's own item loader."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    stored = int((folder / "stored").read_text())
    while True:
        dataset = StreamingDataset(
            str(folder / "litdata"), item_loader=TokensLoader(block_size=stored), shuffle=True, drop_last=True
        )
        for tokens in StreamingDataLoader(dataset, batch_size=batch, num_workers=0, drop_last=True):
            yield tokens.to(torch.int64)


def mosaicml(folder: Path, batch: int) -> Batches:
    """Stream MDS shards with MosaicML Streaming."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)
    while True:
        yield from DataLoader(dataset, batch, drop_last=True, collate_fn=_stack_mds)


def _stack_mds(samples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def webdataset(folder: Path, batch: int) -> Batches:
    """Read tar files with WebDataset's pipeline, shuffled through its buffer."""
    import webdataset as wds

    tars = sorted(str(path) for path in (folder / "tars").glob("*.tar"))
    while True:
        pipe = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode().to_tuple("npy")
        for (rows,) in pipe.batched(batch, partial=False):
            yield torch.from_numpy(np.asarray(rows).astype(np.int64))


def huggingface(folder: Path, batch: int) -> Batches:
    """Index a dataset on disk with lists of rows, in numpy format."""
    import datasets

    rows = datasets.load_from_disk(str(folder / "huggingface")).with_format("numpy")
    while True:
        order = np.random.default_rng(0).permutation(len(rows))
        for i in range(0, len(order) - batch + 1, batch):
            yield torch.from_numpy(rows[order[i : i + batch]]["tokens"].astype(np.int64))


WAYS: dict[str, Callable[[Path, int], Batches]] = {
    "flat memmap take": memmap,
    "Arrow mmap by hand": arrow_mmap,
    "DataLoader": dataloader,
    "DataLoader, 1 worker": dataloader_worker,
    "HF datasets": huggingface,
    "litdata": litdata,
    "WebDataset": webdataset,
    "MosaicML Streaming": mosaicml,
}


def _write_litdata(folder: Path, rows: np.ndarray) -> None:
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader

    folder.mkdir()
    cache = Cache(str(folder), chunk_bytes="32MB", item_loader=TokensLoader(block_size=rows.shape[1]))
    for index, row in enumerate(rows):
        cache[index] = torch.from_numpy(row.astype(np.int32))  # it has no uint16 for tokens
    cache.done()
    cache.merge()


def _write_mds(folder: Path, rows: np.ndarray) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{rows.shape[1]}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=32 << 20) as writer:
        for row in rows:
            writer.write({"tokens": np.asarray(row)})


def _write_tars(folder: Path, rows: np.ndarray) -> None:
    folder.mkdir()
    for low in range(0, len(rows), 8192):
        with tarfile.open(folder / f"{low:09d}.tar", "w") as tar:
            for index in range(low, min(low + 8192, len(rows))):
                file = io.BytesIO()
                np.save(file, rows[index])
                info = tarfile.TarInfo(f"{index:09d}.npy")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)


def _write_huggingface(folder: Path, rows: np.ndarray) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), rows.shape[1])})
    flat = pa.array(np.asarray(rows).reshape(-1))
    table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])})
    datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features)
    ).save_to_disk(str(folder))
