"""Every Triton kernel, compiled ahead of time and looked at: `python -m marrow.kernels.compiled`, no GPU.

Each operator runs its Triton path, forward and backward, on "meta" tensors of its examples; the launches
that would have been are compiled to sm_80, sm_90 and sm_100 as Triton's own launcher would (same types,
`tt.divisibility`, ones as constants), and the cubin is read with the tools of the triton wheel: registers,
spills, shared memory, tensor-core instructions, 128-bit global loads and stores. The table is committed;
`--check` fails where it got worse, `--write` accepts what is. Equal launches are compiled once, and results
are kept in the user's cache under a hash of all sources: a second run takes seconds.

A type that an architecture lacks (fp8 on sm_80) is listed as skipped.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marrow import kernels
from marrow.core import native
from marrow.kernels import dispatch, tile
from marrow.kernels.compiled_table import Row, check, describe, faults, read, write
from marrow.kernels.configs import tables
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.dispatch import Path as KernelPath

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PROCESSES = 2
# fp16 differs from bf16 by conversions alone: each kernel once. PERF: 6 % more rows; all would be 30 %.
_FP16_ARCHITECTURE = 90
_READING = 1  # of cubins: raise it where `_measure` reads something else, and the cache is not used

_TENSOR_CORE = re.compile(r"\b(?:[HIQDBO]G?MMA|UTC[A-Z]*MMA)\b")
_LOAD = re.compile(r"\b(?:LDG|LDGSTS|UTMALDG|UBLKCP)[.\w]*")
_STORE = re.compile(r"\b(?:STG|UTMASTG)[.\w]*")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_DOT = re.compile(r"tt\.dot.*?: tensor<[\dx]+x(\w+)>")
# Relative to the checkout.
TABLE = Path("tests/kernels/compiled.csv")


@dataclass(frozen=True, slots=True)
class Task:
    """A launch to compile, named as its row."""

    row: Row
    launch: tile.Launch


def load_operators() -> list[str]:
    """Import every module of the groups of operators; return those that fail, with the reason."""
    failed = []
    for group in pkgutil.iter_modules(kernels.__path__, "marrow.kernels."):
        if not group.ispkg:
            continue
        for module in pkgutil.iter_modules(importlib.import_module(group.name).__path__, f"{group.name}."):
            try:
                importlib.import_module(module.name)
            except Exception as error:  # noqa: BLE001 (any fault of an operator's file is reported)
                failed.append(f"{module.name}: {error!r}")
    return failed


def collect(
    names: Sequence[str] = (), architectures: Sequence[int] = ARCHITECTURES
) -> tuple[list[Task], list[str]]:
    """List what is to be compiled, each distinct launch of an operator once; and what went wrong."""
    tasks: dict[str, Task] = {}
    complaints = []
    for name, operator in sorted(dispatch.operators().items()):
        path = operator.paths.get("triton")
        if path is None or (names and name not in names):
            continue
        for arch in architectures:
            for dtype in DTYPES:
                if path.dtypes is not None and dtype not in path.dtypes:
                    continue
                is_once = dtype == torch.float16
                if is_once and arch != _FP16_ARCHITECTURE:
                    continue
                try:
                    found = list(_of_operator(operator, path, dtype, arch))
                    if is_once:  # a kernel's last launch: of the largest example
                        found = list({row.kernel: (row, launch) for row, launch in found}.values())
                    for row, launch in found:
                        tasks.setdefault(_identity(row, launch), Task(row, launch))
                except Exception as error:  # noqa: BLE001 (any fault of an operator is reported)
                    complaints.append(f"{name} {_short(dtype)} sm_{arch}: cannot be recorded: {error!r}")
    return sorted(tasks.values(), key=lambda task: task.row.name), complaints


def _of_operator(
    operator: Operator, path: KernelPath, dtype: torch.dtype, arch: int
) -> Iterator[tuple[Row, tile.Launch]]:
    """Record the launches of all examples of an operator: with its defaults, and as tuned on devices."""
    tuned: list[dict[tuple[str, str], dict[str, Any]]] = [
        {
            (op, shape_class): entries
            for op, classes in table.items()
            for shape_class, entries in classes.items()
        }
        for table in tables.of_capability(arch)
    ]
    for example in operator.examples(dtype, "meta"):
        for forced in ({}, *tuned):
            with tile.configuring(forced), tile.recording(arch) as recorded:
                run_example(operator, path, example)
            for launch in recorded:
                settings = launch.constants | launch.options
                config = " ".join(f"{key}={_text(value)}" for key, value in sorted(settings.items()))
                kernel = launch.kernel.__name__
                yield Row(operator.name, kernel, example.label, _short(dtype), arch, config), launch


def run_example(operator: Operator, path: KernelPath, example: Example) -> None:
    """Run forward and backward of an example."""
    outputs = path.forward(*example.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if operator.gradient is not None and path.backward is not None:
        grads = [torch.empty_like(x) for x in outputs[: operator.results]]
        path.backward(*grads, *operator.gradient.saves(tuple(example.inputs), outputs))


def compile_all(tasks: Sequence[Task], processes: int = PROCESSES) -> tuple[list[Row], list[str]]:
    """Compile the tasks, in a few processes; return their rows, and what did not compile, in words."""
    global _queue
    _queue = list(tasks)
    with tempfile.TemporaryDirectory(prefix="marrow-triton-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # what Triton keeps is not needed again
        if processes == 1 or len(tasks) < 4:
            return _parted(_tried(number) for number in range(len(tasks)))
        # fork: kernels cannot be pickled, and no thread has been started yet.
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            return _parted(pool.imap(_tried, range(len(tasks)), chunksize=1))


_queue: list[Task] = []


def _parted(results: Iterable[Row | str]) -> tuple[list[Row], list[str]]:
    found = list(results)
    rows = [x for x in found if isinstance(x, Row)]
    return rows, [x for x in found if isinstance(x, str)]


def _tried(number: int) -> Row | str:
    try:
        return _compiled(number)
    except Exception as error:  # noqa: BLE001 (whatever a compiler raises is reported)
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{' '.join(map(str, _queue[number].row.name))}: does not compile: {' '.join(lines[-3:])}"


def _compiled(number: int) -> Row:
    """Return the row of a task of the queue, from the cache where it is known."""
    task = _queue[number]
    row = task.row
    source, target, options = _source(task.launch, row.arch)
    if why := _lacking(source.signature, options, row.arch):
        return _with(row, {"skipped": why})
    key = hashlib.sha256(
        "\n".join([source.hash(), options.hash(), str(row.arch), _versions()]).encode()
    ).hexdigest()
    kept = native.cache_folder() / f"compiled-{key[:32]}.json"
    try:
        return _with(row, json.loads(kept.read_text()))
    except (OSError, ValueError):  # not known yet, or torn by another process
        found = _measure(source, target, options)
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(found))
    written.replace(kept)
    return _with(row, found)


def _source(launch: tile.Launch, arch: int) -> tuple[Any, Any, Any]:
    """Return what Triton's launcher would compile for a launch: source, target and options."""
    from triton.backends.compiler import GPUTarget  # only where something is compiled
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    named = {**launch.constants, **launch.options}
    bound, kinds, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(
        **launch.arguments, **named
    )
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, kinds, rest)
    return ASTSource(kernel, signature, constants, attributes), target, options


_sources: list[tuple[Any, Any, Any]] = []


def fill_cache(launches: Iterable[tile.Launch], arch: int, processes: int) -> int:
    """Compile launches into Triton's own cache, where its launcher finds them; return how many compiled.

    Processes are forked, as kernels cannot be pickled: they compile, and do not touch the GPU.
    """
    global _sources
    made = [_source(launch, arch) for launch in launches]
    _sources = list({each[0].hash() + each[2].hash(): each for each in made}.values())
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return sum(pool.imap_unordered(_filled, range(len(_sources)), chunksize=1))


def _filled(number: int) -> bool:
    import triton

    source, target, options = _sources[number]
    try:
        triton.compile(source, target=target, options=options.__dict__)
    except Exception:  # noqa: BLE001 (the launcher will say it, if it comes to that)
        return False
    return True


def _measure(source: Any, target: Any, options: Any) -> dict[str, Any]:
    """Compile a kernel and read its cubin."""
    import triton

    made = triton.compile(source, target=target, options=options.__dict__)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = _said(tools / "cuobjdump", "-res-usage", cubin.name)
        assembly = _said(tools / "nvdisasm", "-c", "-ndf", cubin.name)
    loads, stores = _LOAD.findall(assembly), _STORE.findall(assembly)
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage.split("Function")[-1])}
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "spills": len(_SPILL.findall(assembly)),
        "shared_bytes": made.metadata.shared,
        "dots": sum(_is_for_tensor_cores(line) for line in made.asm["ttir"].splitlines()),
        "tensor_core": len(_TENSOR_CORE.findall(assembly)),
        "loads": len(loads),
        "wide_loads": sum(_is_wide(name) for name in loads),
        "stores": len(stores),
        "wide_stores": sum(_is_wide(name) for name in stores),
    }


def _is_for_tensor_cores(line: str) -> bool:
    """Tell whether a line of Triton's IR is a matrix product that is not plain fp32 or fp64."""
    found = _DOT.search(line)
    return found is not None and (found[1] not in ("f32", "f64") or "inputPrecision = tf32" in line)


def _is_wide(instruction: str) -> bool:
    return "128" in instruction or "256" in instruction or instruction.startswith(("UTMA", "UBLK"))


def _said(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout


def _lacking(signature: dict[str, str], options: Any, arch: int) -> str:
    """Say which type of a kernel's arguments an architecture lacks, if any."""
    for kind in signature.values():
        name = str(kind).lstrip("*")
        if name.startswith("fp8") and name not in options.supported_fp8_dtypes:
            return f"sm_{arch} has no {name}"
    return ""


def _identity(row: Row, launch: tile.Launch) -> str:
    """Return a text that is equal for launches of an operator that compile to the same."""
    kinds = []
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            kinds.append(f"{name}:{value.dtype}:{value.storage_offset() * value.element_size() % 16 == 0}")
        elif isinstance(value, bool) or not isinstance(value, int):
            kinds.append(f"{name}:{value if value is None else type(value)}")
        else:
            kinds.append(f"{name}:{value == 1}:{value % 16 == 0}:{-(2**31) <= value < 2**31}")
    return "|".join([row.op, row.kernel, str(row.arch), row.config, *kinds])


def _versions() -> str:
    import triton  # only where something is compiled

    return f"{triton.__version__} {_READING}"


def _with(row: Row, found: dict[str, Any]) -> Row:
    return replace(row, **found)


def _text(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]


def main(arguments: Sequence[str]) -> int:
    """Compile and check, write or print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m marrow.kernels.compiled", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="fail where something got worse")
    mode.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--op", action="append", default=[], help="an operator's name; may be repeated")
    parser.add_argument("--arch", action="append", type=int, default=[], choices=ARCHITECTURES)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    given = parser.parse_args(arguments)
    complaints = load_operators()
    tasks, unrecorded = collect(given.op, given.arch or ARCHITECTURES)
    rows, uncompiled = compile_all(tasks, given.processes)
    complaints += unrecorded + uncompiled
    table = read(given.table) if given.table.exists() else []
    if given.write:
        done = {(row.op, row.arch) for row in rows}
        kept = [] if not given.op and not given.arch else [r for r in table if (r.op, r.arch) not in done]
        write(given.table, sorted([*kept, *rows], key=lambda row: row.name))
        complaints += [f"{' '.join(map(str, row.name))}: {what}" for row in rows for what in faults(row)]
    elif given.check:
        complaints += check(rows, table, is_whole=not given.op and not given.arch)
    else:
        for row in rows:
            print(describe(row))  # noqa: T201 (a program)
    for complaint in complaints:
        print(complaint, file=sys.stderr)  # noqa: T201
    if given.check and complaints:
        hint = f"hint: mend it, or accept it with python -m {__spec__.name} --write"
        print(hint, file=sys.stderr)  # noqa: T201
    print(f"{len(rows)} kernels, {len(complaints)} complaints", file=sys.stderr)  # noqa: T201
    return 1 if complaints else 0


if __name__ == "__main__":
    if tile.IS_INTERPRETED or not tile.IS_WANTED:  # Triton is loaded, or not, when `tile` is imported
        wanted = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "marrow.kernels.compiled", *sys.argv[1:]]
        os.execve(sys.executable, command, wanted | {"MARROW_COMPILE": "1"})
    sys.exit(main(sys.argv[1:]))
