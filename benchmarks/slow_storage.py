"""Does the demo starve when its data lie in 1,000 shards of a slow file system?

The demo's pretraining samples are written into 1,000 shards behind `slow://`, where every request takes 20 to 50 ms and then 100 MB/s.
For each setting the demo's model trains some image steps on them (really: `dsvl_train.training.run`), and the share of the time in which it
waited for data is read from its metrics, the first steps (which fill the look-ahead) left out. The rows compare threads, exact ranges
against cached blocks of several sizes, and whole shards (a block larger than any).

python benchmarks/slow_storage.py [--data runs/demo/data] [--steps 40]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the slow file system is the tests'

SHARDS = 1000
WARM_UP = 5
"""First steps that do not count."""


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    slow: bool = True
    workers: int = 1
    cached: bool = False
    block_bytes: int = 1 << 20


SETTINGS = [
    Setting("local disk, 1 thread", slow=False),
    Setting("ranges, 1 thread"),
    Setting("ranges, 4 threads", workers=4),
    Setting("ranges, 16 threads", workers=16),
    Setting("64 kB blocks, 4 threads", workers=4, cached=True, block_bytes=1 << 16),
    Setting("1 MB blocks, 4 threads", workers=4, cached=True),
    Setting("whole shards, 4 threads", workers=4, cached=True, block_bytes=1 << 30),
]


def write_shards(data: Path, folder: Path) -> None:
    """The demo's pretraining samples, in 1,000 shards."""
    from dsvl_train.data.sample import find_images, parse_sample
    from dsvl_train.data.shards import ShardReader, ShardWriter
    from dsvl_train.data.tar_scan import group_members, scan_tar

    reader = ShardReader()
    groups = []
    for shard in sorted((data / "pretrain").glob("*.tar")):
        scan = scan_tar(shard)
        groups += [(str(shard), scan.size, group) for group in group_members(scan.members)]
    with ShardWriter(folder, max_samples=-(-len(groups) // SHARDS)) as writer:
        for shard_path, size, group in groups:
            spans = [(member.offset, member.size) for member in group.members.values()]
            content = dict(zip(group.members, reader.read(shard_path, spans, size), strict=True))
            sample = parse_sample(content.pop("json"))
            extensions = list(content)
            images = [extensions[place] for place in find_images(sample.images, group.key, extensions)]
            writer.write(sample.messages, [(name.rpartition(".")[2], content[name]) for name in images])


def overrides(data: Path, work: Path, setting: Setting, steps: int) -> list[str]:
    """The demo's pretraining on the slow shards, image steps only."""
    path = f"slow://{work}/shards" if setting.slow else f"{work}/shards"
    more = [f"data.cache_dir={work}/cache-{setting.block_bytes}"] if setting.cached else []
    return [
        "recipe=demo_vl2/pretrain",
        f"run.dir={work}/run",
        f"run.max_steps={steps}",
        "init.from=null",
        "resume=none",
        "logging.progress=false",
        f"data.processor={data}/processor_vl2",
        f"data.sources.pretrain.path={path}",
        "~data.sources.text",
        "data.text_ratio=0",
        "data.text_warmup_steps=0",
        f"data.workers={setting.workers}",
        "data.prefetch_steps=4",
        f"data.index_dir={work}/indexes",
        *more,
    ]


def train(arguments: argparse.Namespace) -> None:
    """Be one row: train, and print a line of JSON."""
    from dsvl_train.config.compose import compose_run
    from dsvl_train.data import storage
    from dsvl_train.reporting.metrics import read_metrics
    from dsvl_train.training.run import run
    from tests.unit.remote_servers import register_slow

    setting = SETTINGS[arguments.row]
    slow = register_slow()
    storage.BLOCK_BYTES = setting.block_bytes
    run(compose_run(overrides(Path(arguments.data), Path(arguments.work), setting, arguments.steps)))
    records = read_metrics(Path(arguments.work) / "run" / "metrics.jsonl")[WARM_UP:]
    waited, computed = (sum(record[name] for record in records) for name in ("data_wait_s", "step_s"))
    result = {"waited": waited, "computed": computed, "steps": len(records), "reads": slow.reads, "bytes": slow.bytes_read}
    print(json.dumps(result), flush=True)


def build_index(data: Path, work: Path) -> None:
    """Without latency: indexing is not what is timed."""
    from dsvl_train.data.index_build import open_index
    from dsvl_train.data.processor import Processor
    from tests.unit.remote_servers import register_slow

    register_slow().latency_s = (0.0, 0.0)
    processor = Processor.from_folder(data / "processor_vl2")
    for path in (f"slow://{work}/shards", f"{work}/shards"):
        open_index(path, processor, setting="shards", command="", index_dir=f"{work}/indexes")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "runs" / "demo" / "data"), help="made by data_recipes.demo.prepare")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        return train(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work, data = Path(temporary), Path(arguments.data)
        if not (data / "manifest.json").exists():
            from data_recipes.demo.prepare import prepare

            data = work / "data"
            prepare(data, seed=0, workers=1, scale=0.25)
        write_shards(data, work / "shards")
        build_index(data, work)
        print(f"{SHARDS} shards; requests of 20 to 50 ms, then 100 MB/s; {arguments.steps - WARM_UP} image steps of the demo")
        for row, setting in enumerate(SETTINGS):
            command = [
                sys.executable,
                __file__,
                "--row",
                str(row),
                "--work",
                str(work),
                "--data",
                str(data),
                "--steps",
                str(arguments.steps),
            ]
            environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # torch's threads would take the cores that the reading threads need
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            result = json.loads(done.stdout.splitlines()[-1])
            total = result["waited"] + result["computed"]
            print(
                f"{setting.name:26} {1e3 * total / result['steps']:6.0f} ms per step, {100 * result['waited'] / total:5.1f} % waiting; "
                f"{result['reads']:6} requests, {result['bytes'] / 1e6:6.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
