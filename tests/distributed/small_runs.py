"""Small runs as a user starts them, on made data: what the tests of runs share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from made_data import picture, write_corpus

from dsvl_train.data.processor import Processor, write_processor_folder
from dsvl_train.data.shards import ShardWriter
from dsvl_train.data.tokenizer import train_byte_level_bpe
from dsvl_train.reporting.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
ANSWERS = ["zero", "one", "two", "three", "four", "five"]


def make_data(folder: Path) -> Path:
    """Processors of both families, shards of pictures with answers, a text corpus."""
    bpe = train_byte_level_bpe([" ".join(ANSWERS), "what is this word on the tile and in the window"] * 20, 300)
    write_processor_folder("vl2", folder / "processor_vl2", bpe, image_size=48, patch_size=8, downsample_ratio=2)
    write_processor_folder("vl", folder / "processor_vl", bpe, image_size=128, tokens_per_image=36)
    with ShardWriter(folder / "shards", max_samples=20) as writer:
        for number in range(60):
            image = picture(40 + 30 * (number % 4), 50, seed=number % 6)
            user = {"role": "user", "content": "<image>\nwhat is this"}
            writer.write([user, {"role": "assistant", "content": ANSWERS[number % 6]}], [("png", image)])
    write_corpus(folder / "text", Processor.from_folder(folder / "processor_vl2"), documents=60)
    return folder


def overrides(data: Path, run_dir: Path, *more: str, family: str = "vl2", stage: str = "pretrain") -> list[str]:
    """A recipe of the demo on the made data, shrunk."""
    sources = {
        "pretrain": [f"data.sources.pretrain.path={data}/shards", f"data.sources.text.path={data}/text"],
        "align": [f"data.sources.align.path={data}/shards"],
        "sft": [
            f"data.sources.sft.path={data}/shards",
            "~data.sources.sft_text",
            f"data.sources.text.path={data}/text",
            "data.sources.text.weight=1.0",
        ],
        "lm": [f"data.sources.text.path={data}/text"],
    }[stage]
    return [
        f"recipe=demo_{family}/{stage}",
        f"run.dir={run_dir}",
        f"data.processor={data}/processor_{family}",
        "init.from=null",
        "run.max_steps=8",
        "data.batch_size=4",
        "data.micro_batch_size=1",
        "data.seq_len=256",
        *([] if stage == "align" else ["data.text_warmup_steps=4"]),
        *sources,
        *more,
    ]


def start(arguments: list[str], ranks: int = 1, torchrun: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
        ranks = 0
    command += ["train.py", *arguments] + ([f"launch.nproc={ranks}"] if ranks > 1 else [])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(arguments: list[str], ranks: int = 1, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    process = start(arguments, ranks, torchrun)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def losses(run_dir: Path) -> list[tuple[int, str, float]]:
    return [(record["step"], record["modality"], record["loss"]) for record in read_metrics(run_dir / "metrics.jsonl")]
