"""Makes the demo's data: `python -m data_recipes.demo.prepare --out runs/demo/data [--seed 0] [--workers N] [--scale 1.0]`.

    processor_vl2/ processor_vl/     one byte-level BPE, trained on the training texts alone
    text/train.{bin,idx,json}        the corpus; text/heldout.jsonl is kept for bits per byte
    align/ pretrain/ sft/ sft_text/  webdataset shards per stage, for both families
    eval/*.jsonl, eval/images/       held-out questions

Nothing is downloaded. The same seed gives the same bytes. A finished folder is used again; an interrupted one is never taken for whole.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

from PIL import Image
from tqdm import tqdm

from data_recipes.demo import samples as demo
from data_recipes.demo.images import TILE, chart_image, digit_image, page_image, word_image, wrap_words
from data_recipes.demo.materials import Materials, load_materials

VERSION = 5
"""Raise it when the data change for the same settings."""
VOCAB_SIZE = 2048
SAMPLES = {"align": 12000, "pretrain": 12000, "sft": 12000, "sft_text": 2500}
"""Samples per stage folder."""
EVAL_ITEMS = {"words": 100, "charts": 60, "pages": 20}
"""Items per task besides the digits, of which all held-out scans are asked."""
PATCH_SIZE, DOWNSAMPLE, VL_IMAGE_SIZE, VL_TOKENS = 8, 2, 128, 36
"""Geometry of the demo models (conf/model/demo_vl2.yaml, demo_vl.yaml)."""
PIXEL_MEAN, PIXEL_STD = [0.95] * 3, [0.3] * 3
"""Normalisation of the demo models; images that are padded are padded with the mean."""
_CHUNK = 250
_SHARD = 1500


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/demo/data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; they change nothing in the data")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual number of samples")
    arguments = parser.parse_args(argv)
    try:
        prepare(Path(arguments.out), seed=arguments.seed, workers=arguments.workers, scale=arguments.scale)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def prepare(out: Path, *, seed: int = 0, workers: int = 1, scale: float = 1.0) -> None:
    """Make the demo's data in `out`, unless they are there with the same settings.

    Raises:
        ValueError: `out` holds something else.
    """
    manifest = {"version": VERSION, "seed": seed, "scale": scale, "python": sys.version.split()[0]}
    if (out / "manifest.json").is_file() and json.loads((out / "manifest.json").read_text()) == manifest:
        print(f"{out}: already prepared")
        return
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise ValueError(f"{out} is not empty and was not made by this recipe; choose another --out")
    unfinished = out.with_name(f".unfinished_{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    train, held = load_materials()
    _write_stages(unfinished, train, seed, workers, scale)  # first: it forks, which is best done before torch and its threads are there
    _write_eval(unfinished / "eval", held, scale)
    _write_text_and_processors(unfinished, train, held)
    (unfinished / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


# ---------------------------------------------------------------------------------------------------------------------- text


def _write_text_and_processors(out: Path, train: Materials, held: Materials) -> None:
    from dsvl_train.data.processor import Processor, write_processor_folder
    from dsvl_train.data.text_corpus import write_text_corpus
    from dsvl_train.data.tokenizer import train_byte_level_bpe

    texts = [document.text for document in train.documents]
    questions = [*demo.DIGIT_QUESTIONS, *demo.WORD_QUESTIONS, *demo.PAGE_QUESTIONS, *demo.COUNT_QUESTIONS, *demo.HIGHEST_QUESTIONS]
    tokenizer = train_byte_level_bpe([*texts, *questions], VOCAB_SIZE)
    normalisation = {"image_mean": PIXEL_MEAN, "image_std": PIXEL_STD}
    write_processor_folder(
        "vl2", out / "processor_vl2", tokenizer, image_size=TILE, patch_size=PATCH_SIZE, downsample_ratio=DOWNSAMPLE, **normalisation
    )
    write_processor_folder("vl", out / "processor_vl", tokenizer, image_size=VL_IMAGE_SIZE, tokens_per_image=VL_TOKENS, **normalisation)
    (out / "text").mkdir()
    write_text_corpus(out / "text" / "train", texts, Processor.from_folder(out / "processor_vl2").tokenizer)
    _write_json_lines(out / "text" / "heldout.jsonl", ({"name": d.name, "text": d.text} for d in held.documents))


def _write_json_lines(path: Path, records: Iterator[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------------- stages


_materials: list[Materials] = []
"""What a worker process makes samples of."""


def _start_worker(train: Materials) -> None:
    _materials[:] = [train]


def _make_chunk(stage: str, seed: int, indices: range) -> list[tuple[list[dict[str, str]], list[bytes], str]]:
    made = (demo.make_sample(stage, index, seed, _materials[0]) for index in indices)
    return [(sample.messages, [_png(image) for image in sample.images], sample.kind) for sample in made]


def _write_stages(out: Path, train: Materials, seed: int, workers: int, scale: float) -> None:
    from dsvl_train.data.shards import ShardWriter

    counts = {stage: max(8, int(number * scale)) for stage, number in SAMPLES.items()}
    with (
        tqdm(total=sum(counts.values()), desc="samples", unit="", disable=None) as bar,
        ProcessPoolExecutor(max(workers, 1), initializer=_start_worker, initargs=(train,)) as pool,
    ):
        for stage, count in counts.items():
            chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
            with ShardWriter(out / stage, max_samples=_SHARD) as writer:
                for chunk in pool.map(partial(_make_chunk, stage, seed), chunks):
                    for messages, images, kind in chunk:
                        writer.write(messages, [("png", image) for image in images], meta={"kind": kind})
                    bar.update(len(chunk))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------- evaluation


def _write_eval(out: Path, held: Materials, scale: float) -> None:
    """Held-out questions, drawn plainly; the same for every seed, so that runs compare."""
    tasks = {
        "digits": ("exact_match", _digit_items(held)),
        "words": ("character_accuracy", _word_items(held)),
        "charts": ("exact_match", _chart_items(held)),
        "pages": ("character_accuracy", _page_items(held)),
    }
    (out / "images").mkdir(parents=True)
    for task, (metric, items) in tasks.items():
        records = []
        for number, (question, image, answer) in enumerate(items):
            if scale < 1 and number >= 10:
                break
            name = f"images/{task}_{number:03d}.png"
            (out / name).write_bytes(_png(image))
            message = {"role": "user", "content": f"<image>\n{question}"}
            records.append({"task": task, "metric": metric, "messages": [message], "images": [name], "answer": answer})
        _write_json_lines(out / f"{task}.jsonl", iter(records))


Item = tuple[str, Image.Image, str]


def _digit_items(held: Materials) -> Iterator[Item]:
    for digit in held.digits:
        yield demo.DIGIT_QUESTIONS[0], digit_image(digit.scan), str(digit.label)


def _word_items(held: Materials) -> Iterator[Item]:
    words = Random("words").sample(held.words, min(EVAL_ITEMS["words"], len(held.words)))
    for word in words:
        yield demo.WORD_QUESTIONS[0], word_image(word), word


def _chart_items(held: Materials) -> Iterator[Item]:
    rng = Random("charts")
    for number in range(EVAL_ITEMS["charts"]):
        chart = rng.choice(held.charts)
        image = chart_image(chart.title, chart.heights, chart.values)
        if number % 2:
            yield demo.HIGHEST_QUESTIONS[0], image, chart.highest
        else:
            yield demo.COUNT_QUESTIONS[0], image, str(len(chart.values))


def _page_items(held: Materials) -> Iterator[Item]:
    rng = Random("pages")
    for _ in range(EVAL_ITEMS["pages"]):
        lines = wrap_words(rng.choice(held.passages), 3 * TILE, 2)
        yield demo.PAGE_QUESTIONS[0], page_image(lines, 3 * TILE, 2 * TILE), "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
