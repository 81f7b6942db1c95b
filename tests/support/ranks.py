"""Real ranks for tests: processes that talk over gloo, forked from a parent that has torch."""

import io
import multiprocessing
import os
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch", "torch.distributed.fsdp", "marrow.train.step"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def run_ranks(
    world: int, job: Callable[..., Any], *given: Any, folder: Path, timeout_s: float = 120
) -> list[Any]:
    """Run `job(rank, *given)` on every rank of a gloo group; return what each gives, by rank.

    folder: where the ranks meet. What a rank raises is raised here, with its traceback.
    """
    meeting = folder / f"meeting-{uuid.uuid4().hex}"
    pipes, processes = [], []
    for rank in range(world):
        here, there = _context.Pipe()
        process = _context.Process(
            target=_rank, args=(rank, world, str(meeting), there, job, given), daemon=True
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} of {world} gave nothing for {timeout_s} s")
            try:
                ok, result = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                processes[rank].join()
                raise RuntimeError(f"rank {rank} ended with {processes[rank].exitcode}") from None
            if not ok:
                raise RuntimeError(f"rank {rank} of {world}:\n{result}")
            results.append(result)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, world: int, meeting: str, pipe: Connection, job: Callable[..., Any], given: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    told = io.BytesIO()  # as bytes: a tensor sent as such lives in its sender's memory
    try:
        torch.save((True, job(rank, *given)), told)
    except BaseException:  # noqa: BLE001 - told to the test
        torch.save((False, traceback.format_exc()), told)
    pipe.send_bytes(told.getvalue())
    pipe.close()
    os._exit(0)  # gloo's threads may abort an orderly exit
