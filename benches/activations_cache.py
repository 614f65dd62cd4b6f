"""The activation cache against other ways to keep rows: writing, reading warm and cold, opening.

A row is 4,096 values of bfloat16, 8 KiB. All files lie in one folder on one disk, every way runs in fresh processes that
take turns, and a figure counts only when what was written or read equals the source byte by byte. Peers for writing:
`direct`, the plain loop that writes past the page cache; `safetensors`, which wants all rows in memory at once;
`buffered`, the same bytes through the page cache. `sync` is part of every time. Peers for reading hold the rows as they
like them best; safetensors, torch and NumPy read the cache's own file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import corpus
import measure

WIDTH = 4096
ROW_BYTES = 2 * WIDTH
LAYERS = (11, 23, 35)
BATCH = 2048
"""Rows of a layer that come at once: a forward's."""
BLOCK_BYTES = 4 << 20
"""What the plain loop writes at once."""
WINDOW = 12
"""Rows side by side, as an example reads them."""
UNITS, UNIT_ROWS = 1000, 12_000
"""A large cache, and rows of each layer in a unit: a fourth of what `ao collect` puts in one, as opening reads none."""
CONTRACT = json.dumps({"model": "bench", "weights": "random"})

WRITERS = ("ours", "direct", "safetensors", "buffered")
READERS = ("view", "gather")
"""Ours: `layer[first:end]`, and the copy that a batch is made with."""
PEERS = ("safetensors", "torch_mmap", "numpy_memmap", "arrow", "zarr", "tensorstore")
COLD = ("mmap", "auto", "direct", "hinted")
SEQUENTIAL = ("memcpy", "safetensors", "numpy_memmap")
OPTIONAL = ("zarr", "tensorstore")
"""Peers that are compared where they are installed."""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--bytes", type=int, help="size of what is written and read; 2 GiB, or 64 MiB with --quick")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.bytes = args.bytes or (64 << 20 if args.quick else 2 << 30)
    args.repeats = 2 if args.quick else 5
    if args.child:
        children = {
            "write": write, "make": make, "warm": warm, "cold": cold, "sequential": sequential, "units": make_units,
            "open": open_units,
        }  # fmt: skip
        print(json.dumps(children[args.child](args)))
        return
    with tempfile.TemporaryDirectory(dir=corpus.cache_folder(), prefix=".activations-") as folder:
        args.folder = Path(folder)
        measure.tell([*written(args), *read(args), *opened(args)], as_json=args.json)


def in_turns(args: argparse.Namespace, child: str, ways: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """Every figure of every way in each of the repeats."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(args.repeats):
        # Another one begins each time: memory that a process before has used is faster to get than fresh memory.
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            runs[way].append(run(args, child, way))
    return {way: {name: [each[name] for each in found] for name in found[0]} for way, found in runs.items()}


def run(args: argparse.Namespace, child: str, way: str = "ours") -> dict[str, Any]:
    options = ("--of", way, "--bytes", args.bytes, "--folder", args.folder, *["--quick"] * args.quick)
    return measure.child(__file__, "--child", child, *options)


def compared(
    name: str,
    unit: str,
    runs: dict[str, dict[str, list[float]]],
    figure: str,
    *,
    note: str,
    more_is_better: bool = False,
) -> dict[str, Any]:
    """Medians of one figure; the first way is ours."""
    medians = {way: statistics.median(found[figure]) for way, found in runs.items()}
    spread = ", ".join(f"{way} {measure.median_and_spread(found[figure])}" for way, found in runs.items())
    value, *_ = medians.values()
    peers = dict(list(medians.items())[1:])
    note = f"{note}; {spread}"
    return measure.row(f"activations/{name}", unit, value, peers=peers, more_is_better=more_is_better, note=note)


# --- Writing ---------------------------------------------------------------------------------------------------------


def written(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput, CPU and memory of the writers."""
    runs = in_turns(args, "write", WRITERS)
    about = f"{args.bytes / 1e9:.2g} GB of {len(LAYERS)} layers in batches of {BATCH} rows, to the disk"
    return [
        compared("write", "GB/s", runs, "gb_per_second", more_is_better=True, note=f"{about}; target 0.85 of direct"),
        compared(
            "write_cpu", "CPU s/GB", runs, "cpu_per_gb",
            note="user and system, all threads of the process (the kernel's own, which write the page cache out, are not "
            "in it); target at most 0.25",
        ),
        compared(
            "write_memory", "MB", runs, "extra_mb", note="peak of resident memory above the source's; target at most 64"
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Random rows in memory, by layer, with what the cache keeps of each row."""

    tensors: list[Any]
    """By layer bfloat16 [K, WIDTH]."""
    keys: np.ndarray
    """uint64 [K, 2]."""
    norms: np.ndarray
    """float32 [K]."""

    @classmethod
    def random(cls, num_bytes: int) -> Source:
        import torch

        # Whole blocks of each layer, so that the plain loop needs no code for an end.
        count = num_bytes // len(LAYERS) // BLOCK_BYTES * BLOCK_BYTES // ROW_BYTES
        random = np.random.default_rng(0)
        tensors = []
        for _ in LAYERS:
            rows = np.empty((count, WIDTH // 2), np.float32)
            random.random(dtype=np.float32, out=rows)  # in place: the peak of memory is the source itself
            tensors.append(torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16))
        return cls(tensors, random.integers(2**63, size=(count, 2), dtype=np.uint64), np.ones(count, np.float32))

    def bits(self) -> list[np.ndarray]:
        """By layer int16 [K, WIDTH], the same memory."""
        import torch

        return [tensor.view(torch.int16).numpy() for tensor in self.tensors]


def write(args: argparse.Namespace) -> dict[str, float]:
    """Write the rows once, then read them back and compare."""
    import safetensors.torch  # noqa: F401 - before memory is measured

    import ao._ao  # noqa: F401

    source = Source.random(args.bytes)
    num_bytes = sum(bits.nbytes for bits in source.bits())
    work = {"ours": write_ours, "direct": write_direct, "safetensors": write_safetensors, "buffered": write_buffered}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.sync()  # what the writer before has left to the system is not this one's to pay for
        before = measure.rss_bytes()
        _, figures = measure.timed(lambda: work[args.of](source, Path(folder)))
        for layer, found, wanted in zip(LAYERS, stored(args.of, Path(folder)), source.bits(), strict=True):
            if not np.array_equal(found, wanted):
                raise SystemExit(f"{args.of}: layer {layer} is not what was written")
    return {
        "gb_per_second": num_bytes / 1e9 / figures["seconds"],
        "cpu_per_gb": figures["cpu_seconds"] / (num_bytes / 1e9),
        "extra_mb": max(figures["peak_rss_bytes"] - before, 0) / 1e6,
    }


def write_ours(source: Source, folder: Path) -> None:
    """As a collector does: the layers of a batch one after the other."""
    writer = activation_writer(folder, layers=LAYERS)
    bits = source.bits()
    for first in range(0, len(source.keys), BATCH):
        part = slice(first, first + BATCH)
        for layer, rows in zip(LAYERS, bits, strict=True):
            writer.append(layer, source.keys[part], source.norms[part], rows[part])
    writer.finish()


def activation_writer(folder: Path, *, layers: tuple[int, ...], unit: int = 0, width: int = WIDTH) -> Any:
    from ao._ao import ActivationWriter

    return ActivationWriter(
        folder, run="bench", unit=unit, contract_json=CONTRACT, dtype="BF16", width=width, layers=layers
    )


def write_direct(source: Source, folder: Path) -> None:
    """The plain loop: one buffer, which begins at a page, one write after the other."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    block = np.frombuffer(buffer, np.int16)
    file = os.open(folder / "rows", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    offset = 0
    for rows in source.bits():
        for part in rows.reshape(-1, BLOCK_BYTES // 2):
            np.copyto(block, part)
            offset += os.pwrite(file, buffer, offset)
    os.fdatasync(file)
    os.close(file)


def write_safetensors(source: Source, folder: Path) -> None:
    """One file of all layers."""
    from safetensors.torch import save_file

    save_file(dict(zip(map(str, LAYERS), source.tensors, strict=True)), folder / "rows")
    with open(folder / "rows", "rb") as file:
        os.fsync(file)


def write_buffered(source: Source, folder: Path) -> None:
    """Through the page cache."""
    with open(folder / "rows", "wb", buffering=0) as file:
        for rows in source.bits():
            for part in rows.reshape(-1, BLOCK_BYTES // 2):
                file.write(part)
        os.fsync(file)


def stored(way: str, folder: Path) -> list[np.ndarray]:
    """What a writer left, by layer int16 [K, WIDTH]; ours as any reader of safetensors sees it."""
    import torch
    from safetensors.torch import load_file

    if way == "ours":
        tensors = [load_file(folder / f"bench-00000-L{layer:03}.safetensors")["activations"] for layer in LAYERS]
    elif way == "safetensors":
        of_layer = load_file(folder / "rows")
        tensors = [of_layer[str(layer)] for layer in LAYERS]
    else:
        return list(np.fromfile(folder / "rows", np.int16).reshape(len(LAYERS), -1, WIDTH))
    return [tensor.view(torch.int16).numpy() for tensor in tensors]


# --- Reading ---------------------------------------------------------------------------------------------------------


def read(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Warm rows and windows, cold windows, and the whole file."""
    run(args, "make")
    absent = [name for name in OPTIONAL if find_spec(name) is None]
    here = tuple(peer for peer in PEERS if peer not in absent)
    runs = in_turns(args, "warm", (*READERS, *here))
    about = "copied into an array; pages in the system's cache, mapped as they are first touched"
    about += f"; left out, not installed: {', '.join(absent)}" if absent else ""
    made = []
    for way in READERS:
        each = {name: runs[name] for name in (way, *here)}
        made += [
            compared(f"warm_row/{way}", "us", each, "row_us", note=f"{about}; target at most 5"),
            compared(f"warm_window/{way}", "us", each, "window_us", note=f"{WINDOW} rows, {about}; target at most 15"),
        ]
    runs = in_turns(args, "cold", COLD)
    mapped = {"mmap": runs.pop("mmap")}
    for mode, mine in runs.items():
        for figure, what in (("batch", "all as one gather"), ("alone", "one gather after the other")):
            each = {mode: mine, **mapped}
            amounts = ", ".join(f"{way} {statistics.median(run[f'{figure}_read']):.3g}" for way, run in each.items())
            note = f"{what}; mmap: a default NumPy map, one window after the other; read per byte wanted: {amounts}"
            note += "; target 10 times" if (mode, figure) == ("auto", "batch") else ""
            made.append(compared(f"cold_windows_{figure}/{mode}", "us/window", each, f"{figure}_us", note=note))
    runs = in_turns(args, "sequential", (*READERS, *SEQUENTIAL))
    for way in READERS:
        each = {name: runs[name] for name in (way, *SEQUENTIAL)}
        first = ", ".join(f"{name} {statistics.median(run['first']):.3g}" for name, run in each.items())
        threads = "all cores" if way == "gather" else "one thread"
        note = (
            f"{BATCH} rows at a time into one array, {threads}, peers one thread; the first pass, which also maps the "
        )
        note += f"pages of those that map: {first}; target: memcpy"
        made.append(compared(f"sequential/{way}", "GB/s", each, "gb_per_second", more_is_better=True, note=note))
    return made


def rows_file(folder: Path) -> Path:
    """The cache's file of rows."""
    return folder / "cache" / f"bench-00000-L{LAYERS[0]:03}.safetensors"


def plain(folder: Path) -> np.ndarray:
    """The rows, uint16 [K, WIDTH], as a default map of the file."""
    return np.memmap(rows_file(folder), np.uint16, "r", offset=4096).reshape(-1, WIDTH)


def make(args: argparse.Namespace) -> None:
    """Write a cache of one layer, and the same rows as the peers that want files of their own like them best."""
    import pyarrow as pa

    count = args.bytes // ROW_BYTES
    random = np.random.default_rng(1)
    writer = activation_writer(args.folder / "cache", layers=LAYERS[:1])
    for first in range(0, count, BATCH):
        rows = random.integers(2**16, size=(min(BATCH, count - first), WIDTH), dtype=np.uint16)
        keys = random.integers(2**63, size=(len(rows), 2), dtype=np.uint64)
        writer.append(LAYERS[0], keys, np.ones(len(rows), np.float32), rows)
    writer.finish()
    rows = plain(args.folder)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), WIDTH)
    batch = pa.RecordBatch.from_arrays([column], names=["rows"])
    with pa.OSFile(str(args.folder / "arrow"), "wb") as file, pa.ipc.new_file(file, batch.schema) as stream:
        stream.write_batch(batch)
    # Chunks of about a window, many to a file.
    if find_spec("zarr"):
        import zarr

        layout: dict[str, Any] = {"shape": rows.shape, "chunks": (16, WIDTH), "shards": (BATCH, WIDTH)}
        array = zarr.create_array(args.folder / "zarr", dtype="uint16", compressors=None, **layout)
        array[:] = rows
    if find_spec("tensorstore"):
        store = tensorstore(args.folder, shape=rows.shape)
        store.write(rows).result()


def tensorstore(folder: Path, shape: tuple[int, ...] | None = None) -> Any:
    """The peer's array; a new one if it is to have a shape."""
    import tensorstore as ts

    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "tensorstore")}}
    if shape is None:
        return ts.open(spec).result()
    grid = lambda rows: {"name": "regular", "configuration": {"chunk_shape": [rows, WIDTH]}}  # noqa: E731
    inner = {"chunk_shape": [16, WIDTH], "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
    sharding = {"name": "sharding_indexed", "configuration": inner}
    metadata = {"shape": shape, "data_type": "uint16", "chunk_grid": grid(BATCH), "codecs": [sharding]}
    return ts.open(spec | {"metadata": metadata}, create=True).result()


def reader(way: str, folder: Path, out: np.ndarray) -> Callable[[int], Any]:
    """What copies the rows from a given one on into `out`, uint16 [K, WIDTH], all of it."""
    count = len(out)
    if way in READERS:
        from ao.cache import ActivationCache

        layer = ActivationCache.open(folder / "cache").layer(LAYERS[0])
        if way == "gather":
            return lambda first: layer.gather(np.arange(first, first + count), out)
        if count == 1:
            row = out[0]
            return lambda first: np.copyto(row, layer[first])
        return lambda first: np.copyto(out, layer[first : first + count])
    if way == "numpy_memmap":
        mapped = plain(folder)
        return lambda first: np.copyto(out, mapped[first : first + count])
    if way == "memcpy":
        array = np.array(plain(folder))
        return lambda first: np.copyto(out, array[first : first + count])
    if way == "arrow":
        import pyarrow as pa

        column = pa.ipc.open_file(pa.memory_map(str(folder / "arrow"))).get_batch(0).column(0)
        flat = out.reshape(-1)
        return lambda first: np.copyto(flat, column.slice(first, count).flatten().to_numpy())
    if way == "zarr":
        import zarr

        array = zarr.open_array(folder / "zarr", mode="r")
        return lambda first: np.copyto(out, array[first : first + count])
    if way == "tensorstore":
        store = tensorstore(folder)
        return lambda first: np.copyto(out, store[first : first + count].read().result())
    import torch

    torch.set_num_threads(1)
    into = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    if way == "safetensors":
        from safetensors import safe_open

        rows = safe_open(rows_file(folder), framework="pt").get_slice("activations")
    else:
        size = os.path.getsize(rows_file(folder)) // 2
        rows = torch.from_file(str(rows_file(folder)), size=size, dtype=torch.bfloat16)[2048:].view(-1, WIDTH)
    return lambda first: into.copy_(rows[first : first + count])


def drawn(rows: int, count: int) -> list[int]:
    """Where random windows begin."""
    return np.random.default_rng(2).integers(rows - WINDOW, size=count).tolist()


def fetch(path: Path) -> None:
    """Bring a file, or those of a folder, into the page cache."""
    for each in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        with open(each, "rb", buffering=0) as file:
            while file.read(BLOCK_BYTES):
                pass


def warm(args: argparse.Namespace) -> dict[str, float]:
    """Median time for a random row and for a window."""
    source = plain(args.folder)
    fetch(args.folder / args.of if args.of in ("arrow", *OPTIONAL) else rows_file(args.folder))
    firsts = drawn(len(source), 200 if args.quick else 2000)
    found = {}
    for name, count in (("row_us", 1), ("window_us", WINDOW)):
        out = np.zeros((count, WIDTH), np.uint16)
        get = reader(args.of, args.folder, out)
        for first in firsts[:20]:
            get(first)
            if not np.array_equal(out, source[first : first + count]):
                raise SystemExit(f"{args.of}: the rows from {first} on are not those that were written")
        times = []
        for first in firsts[20:]:
            started = time.perf_counter()
            get(first)
            times.append(1e6 * (time.perf_counter() - started))
        found[name] = statistics.median(times)
    return found


def cold(args: argparse.Namespace) -> dict[str, float]:
    """Time of a window when the file is only on the disk, and the bytes that came from there for one that was wanted."""
    from ao.cache import ActivationCache

    firsts = drawn(args.bytes // ROW_BYTES, 100 if args.quick else 400)
    rows = np.array(firsts)[:, None] + np.arange(WINDOW)
    out = np.zeros((*rows.shape, WIDTH), np.uint16)

    def one_map() -> None:
        mapped = plain(args.folder)
        for into, first in zip(out, firsts, strict=True):
            np.copyto(into, mapped[first : first + WINDOW])

    layer = ActivationCache.open(args.folder / "cache").layer(LAYERS[0])

    def batch() -> None:
        layer.gather(rows.reshape(-1), out.reshape(-1, WIDTH), mode=args.of)

    def alone() -> None:
        for into, each in zip(out, rows, strict=True):
            layer.gather(each, into, mode=args.of)

    # mmap is measured once, and is the peer of both.
    works = {"batch": one_map, "alone": one_map} if args.of == "mmap" else {"batch": batch, "alone": alone}
    found: dict[str, float] = {}
    for name, work in works.items():
        evict(rows_file(args.folder))
        out[:] = 0
        before, started = disk_bytes(), time.perf_counter()
        work()
        found[f"{name}_us"] = 1e6 * (time.perf_counter() - started) / len(firsts)
        found[f"{name}_read"] = (disk_bytes() - before) / out.nbytes
        # The map is gone behind the comparison: pages that are mapped cannot be evicted.
        if not np.array_equal(out, plain(args.folder)[rows]):
            raise SystemExit(f"{args.of}, {name}: the windows are not those that were written")
    return found


def evict(path: Path) -> None:
    """Drop a file from the page cache, and prove it."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    mapping = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    pages = np.frombuffer(mapping, np.uint8)
    there = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8)
    failed = ctypes.CDLL(None).mincore(
        ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(len(pages)), ctypes.c_void_p(there.ctypes.data)
    )
    os.close(file)
    if failed or (there & 1).mean() > 0.001:
        raise SystemExit(f"{path}: {(there & 1).mean():.1%} of it cannot be evicted from the page cache")


def disk_bytes() -> int:
    """Bytes that this process has had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def sequential(args: argparse.Namespace) -> dict[str, float]:
    """Every row in order, a batch at a time, from the page cache."""
    source = plain(args.folder)
    out = np.zeros((BATCH, WIDTH), np.uint16)
    fetch(rows_file(args.folder))
    get = reader(args.of, args.folder, out)
    firsts = range(0, len(source), BATCH)
    for first in [firsts[-1], *firsts[:3]]:
        get(first)
        if not np.array_equal(out, source[first : first + BATCH]):
            raise SystemExit(f"{args.of}: the rows from {first} on are not those that were written")
    get = reader(args.of, args.folder, out)  # nothing is mapped again
    found = []
    for _ in range(3):
        started = time.perf_counter()
        for first in firsts:
            get(first)
        found.append(source.nbytes / 1e9 / (time.perf_counter() - started))
    return {"first": found[0], "gb_per_second": statistics.median(found[1:])}


# --- Opening ---------------------------------------------------------------------------------------------------------


def opened(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Opening a large cache, and finding rows in it."""
    about = run(args, "units")
    runs = in_turns(args, "open", ("manifest", "indexes"))
    of = f"{about['units']} units of {len(LAYERS)} layers, {about['rows']:,} rows, indexes of {about['megabytes']:.0f} MB"
    return [
        compared("open", "ms", runs, "open_ms", note=f"{of}; peer: ours while there is no manifest; target at most 20"),
        compared("open_find", "ms", runs, "find_ms", note=f"also the rows of 1,000 keys of a layer; {of}"),
    ]


def make_units(args: argparse.Namespace) -> dict[str, float]:
    """Write units whose indexes are of a real size; their rows have two values, which opening does not see."""
    random = np.random.default_rng(3)
    units, count = (20 if args.quick else UNITS), UNIT_ROWS
    folder = args.folder / "units"
    for unit in range(units):
        writer = activation_writer(folder, layers=LAYERS, unit=unit, width=2)
        keys = random.integers(2**63, size=(count, 2), dtype=np.uint64)
        for layer in LAYERS:
            writer.append(layer, keys, np.ones(count, np.float32), np.full((count, 2), unit, np.uint16))
        writer.finish()
        if unit == units // 2:
            np.save(args.folder / "keys.npy", keys[:1000])
    from ao.cache import ActivationCache

    ActivationCache.open(folder).write_manifest()
    (folder / "manifest.json").rename(args.folder / "units-manifest.json")
    size = sum(path.stat().st_size for path in folder.glob("*.index.safetensors"))
    return {"units": units, "rows": units * count * len(LAYERS), "megabytes": size / 1e6}


def open_units(args: argparse.Namespace) -> dict[str, float]:
    """Open the cache, then look for keys of its middle unit."""
    from ao.cache import ActivationCache

    keys = np.load(args.folder / "keys.npy")
    manifest = args.folder / "units" / "manifest.json"
    manifest.unlink(missing_ok=True)
    if args.of == "manifest":
        shutil.copy(args.folder / "units-manifest.json", manifest)
    started = time.perf_counter()
    cache = ActivationCache.open(args.folder / "units")
    open_seconds = time.perf_counter() - started
    rows = cache.layer(LAYERS[1]).find(keys)
    find_seconds = time.perf_counter() - started
    middle = len(cache.units) // 2
    if not np.array_equal(rows, middle * UNIT_ROWS + np.arange(len(keys))):
        raise SystemExit("the rows that were found are not those of the keys")
    return {"open_ms": 1e3 * open_seconds, "find_ms": 1e3 * find_seconds}


if __name__ == "__main__":
    main()
