"""An index of many samples: bytes on disk, seconds and memory to open it, to make a source of it, and to look samples up; and what it takes
to go on in the middle of a run over it.

    python benchmarks/index_size.py --samples 100000000 --folder /a/disk/with/13/gigabytes

Samples are made up (one image and two turns each, keys of nine digits) and written by the code that writes indexes; one in a thousand is
too long for its run. Timed once right after writing, so most pages are in memory; `--cold` asks the system to forget them first.

For the resume, a run stands at several places of its first three epochs, with the state of its data as a checkpoint has it. A process of
its own opens the index, restores the state and plans the next global batch, which must be the one that the run itself goes on with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsvl_train.config.schema import DataConfig, SourceConfig
from dsvl_train.data.arrays import Column, write_arrays
from dsvl_train.data.cursor import Cursor, StreamCursor
from dsvl_train.data.index import VERSION, load_index
from dsvl_train.data.plan import GlobalBatchPlan, Planner
from dsvl_train.data.sources import ShardSource

CHUNK = 1 << 20
PER_SHARD = 10_000
TOO_LONG_EVERY = 1000

MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
from dsvl_train.data.index import load_index
from dsvl_train.data.order import EpochOrder
from dsvl_train.data.sources import ShardSource

def anonymous_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

def timed(work):
    start = time.perf_counter()
    return work(), time.perf_counter() - start

before = anonymous_mb()
index, open_s = timed(lambda: load_index(Path(sys.argv[1])))
open_mb = anonymous_mb() - before
source, source_s = timed(lambda: ShardSource("m", "multimodal", index, None, None, 4096))
source_mb = anonymous_mb() - before
numbers = np.random.default_rng(0).integers(0, source.totals()[0], 10_000)
_, window_s = timed(lambda: (source.lengths(numbers[:1024]), source.tiles(numbers[:1024])))
_, lookups_s = timed(lambda: [(index.key(n), index.turns(n), index.image_sizes(n), index.where(n)) for n in numbers.tolist()])
order, order_s = timed(lambda: EpochOrder(source.shard_sizes, 0, "m"))
_, draw_s = timed(lambda: order.sample(len(index) * 3 // 2))
print(json.dumps({"samples": len(index), "open_ms": open_s * 1e3, "open_mb": open_mb, "source_s": source_s, "source_mb": source_mb,
                  "lengths_of_1024_ms": window_s * 1e3, "lookup_us": lookups_s / len(numbers) * 1e6,
                  "first_draw_ms": (order_s + draw_s) * 1e3, "end_mb": anonymous_mb() - before}))
"""


PLACES = (0.0, 0.1, 0.5, 0.99, 2.5)
"""Epochs."""

RESUME = """
import hashlib, json, sys, time
start = time.perf_counter()
from pathlib import Path
from benchmarks.index_size import open_planner, fingerprint
imported = time.perf_counter()
planner = open_planner(Path(sys.argv[1]))
opened = time.perf_counter()
plan, _ = planner.plan(planner.restore(json.loads(sys.stdin.read())))
planned = time.perf_counter()
print(json.dumps({"opened_s": opened - imported, "planned_s": planned - opened, "imported_s": imported - start,
                  "batch": fingerprint(plan)}))
"""


def open_planner(path: Path) -> Planner:
    """The planner of a run over a made index: global batches of 256 sequences of 4,096 tokens."""
    sources = {"m": SourceConfig(kind="shards", path="unused", modality="multimodal")}
    cfg = DataConfig(processor="unused", sources=sources, seq_len=4096, packing=True, batch_size=256)
    unused: Any = None
    return Planner([ShardSource("m", "multimodal", load_index(path), unused, unused, cfg.seq_len)], cfg, 0)


def fingerprint(plan: GlobalBatchPlan) -> str:
    """Of the samples and packs of a global batch."""
    return hashlib.sha256(repr(plan.packs).encode()).hexdigest()


def measure_resume(path: Path, environment: dict[str, str]) -> None:
    """Print a line for each place of a run."""
    planner = open_planner(path)
    (source,) = planner.sources
    samples = int(source.shard_sizes.sum())
    for place in PLACES:
        drawn = int(place * samples)
        stream = StreamCursor(("m",), drawn=(drawn,), credits=(0.0,), window=drawn // planner.cfg.window)
        cursor = Cursor(step=1 + drawn // 2000, streams={"multimodal": stream})
        for _ in range(20):  # so that packs are under way
            _, cursor = planner.plan(cursor)
        state = json.dumps(planner.state(cursor))
        command = [sys.executable, "-c", RESUME, str(path)]
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True, input=state).stdout)
        assert found["batch"] == fingerprint(planner.plan(cursor)[0]), "another global batch than the run's own"
        print(
            f"resumed after {place:g} epochs: state {len(state)} bytes; index opened in {found['opened_s']:.2f} s, state restored and the "
            f"next global batch planned in {found['planned_s']:.3f} s (imports {found['imported_s']:.1f} s)",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Size and speed of a large index.")
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--folder", default=None, help="where to write it for the time (default: the system's folder for temporary files)")
    parser.add_argument("--cold", action="store_true", help="drop its pages from memory before it is opened")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "index.safetensors"
        start = time.perf_counter()
        write_made_index(path, arguments.samples)
        size = path.stat().st_size
        seconds = time.perf_counter() - start
        print(f"{arguments.samples} samples: {size / 1e9:.2f} GB, {size / arguments.samples:.0f} bytes each, written in {seconds:.0f} s")
        if arguments.cold:
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        command = [sys.executable, "-c", MEASURE, str(path)]
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        print(", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
        measure_resume(path, environment)
    return 0


def write_made_index(path: Path, samples: int) -> None:
    """Write an index of made-up samples, piece by piece."""
    shards = -(-samples // PER_SHARD)
    tokens = 100 + (np.arange(samples, dtype=np.int32) % 900)
    tokens[::TOO_LONG_EVERY] = 5000
    facts = {
        "version": VERSION,
        "fingerprint": "made",
        "shards": [f"{number:06d}.tar" for number in range(shards)],
        "digest": "made",
        "tokens": int(tokens.sum(dtype=np.int64)),
        "tiles": 3 * samples,
        "damaged": [],
    }

    def of_samples(name: str, dtype: str, of: Callable[[NDArray[np.int64]], NDArray[Any]], per: int = 1, extra: int = 0) -> Column:
        rows = samples * per + extra

        def pieces() -> Iterator[NDArray[Any]]:
            for start in range(0, rows, CHUNK):
                yield of(np.arange(start, min(start + CHUNK, rows), dtype=np.int64)).astype(dtype)

        return Column(name, np.dtype(dtype), (rows,), pieces())

    def small(name: str, values: NDArray[np.int64]) -> Column:
        return Column(name, values.dtype, values.shape, [values])

    zeros = np.zeros(shards, dtype=np.int64)
    sizes = of_samples("image_wh_i", "<i4", lambda at: np.stack([640 + at % 640, 480 + at % 480], axis=1))
    columns = [
        small("shard_bytes", zeros),
        small("shard_mtime_ns", zeros),
        small("first_sample_s", np.minimum(np.arange(shards + 1) * PER_SHARD, samples).astype(np.int64)),
        of_samples("shard_n", "<i4", lambda at: at // PER_SHARD),
        of_samples("first_member_n", "<i8", lambda at: at * 2, extra=1),
        of_samples("offset_m", "<i8", lambda at: at * 60_000 + 512, per=2),
        of_samples("size_m", "<i8", lambda at: 1000 + at % 100_000, per=2),
        Column(sizes.name, sizes.dtype, (samples, 2), sizes.pieces),
        of_samples("hash_n", "<u8", lambda at: at * 2654435761),
        of_samples("tokens_n", "<i4", lambda at: tokens[at]),
        of_samples("supervised_n", "<i4", lambda at: at % 50 + 1),
        of_samples("visual_n", "<i4", lambda at: at % 90 + 1),
        of_samples("tiles_n", "<i4", lambda at: at * 0 + 3),
        of_samples("first_turn_n", "<i8", lambda at: at * 2, extra=1),
        of_samples("turn_tokens_t", "<i4", lambda at: at % 60, per=2),
        of_samples("turn_supervised_t", "<i4", lambda at: at % 2 * 30, per=2),
        of_samples("key_text", "|u1", lambda at: 48 + at % 10, per=9),
        of_samples("first_key_n", "<i8", lambda at: at * 9, extra=1),
        Column("skipped_text", np.dtype("|u1"), (0,), []),
        small("first_skipped_k", np.zeros(1, dtype=np.int64)),
    ]
    write_arrays(path, {"index": json.dumps(facts)}, columns)


if __name__ == "__main__":
    sys.exit(main())
