"""Small made samples of the layouts in which benchmarks are published."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_mmlu(folder: Path) -> Path:
    """Folders `test` and `dev` of two subjects."""
    rows = {
        "abstract_algebra": [
            ("What is 2 + 2, at last?", "3", "4", "5", "twenty two", "B"),
            ('A "ring", has', "one", "two", "x, y", "no", "C"),
        ],
        "anatomy": [("Which is a bone?\nThink.", "the femur", "the liver", "the skin", "the eye", "A")],
    }
    for part in ("test", "dev"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for subject, lines in rows.items():
            with (folder / part / f"{subject}_{part}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([(f"{part} {line[0]}", *line[1:]) for line in lines] * (1 if part == "test" else 3))
    return folder


def write_hellaswag(path: Path) -> Path:
    lines = [
        {
            "ind": 4,
            "activity_label": "Removing ice",
            "ctx_a": "A man sits [header] on a roof.",
            "ctx_b": "he",
            "ctx": "unused",
            "endings": ["is using wrap to wrap skis.", "rips tiles off.", "holds a cube  of ice.", "pulls [step] up roofing."],
            "label": 3,
        },
        {"ctx": "How to cook rice [title] Wash it", "endings": ["in cold water.", "never.", "by night.", "twice."], "label": "0"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_gsm8k(path: Path) -> Path:
    lines = [
        {"question": "Ann has 3 apples and buys 4. How many?", "answer": "She has 3+4=<<3+4=7>>7 apples.\n#### 7"},
        {"question": "A car costs $1,000 and 200 more.", "answer": "1000+200=1,200\n#### 1,200"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_mmbench(path: Path) -> Path:
    """Three rows: one with a hint, one with two options, one whose image is another row's."""
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]
    pictures = [base64.b64encode(png(seed, size)).decode() for seed, size in ((0, (40, 30)), (1, (300, 220)))]
    rows = [
        ["7", "What is on the picture?", "Look\tclosely.", "a cat", "a dog", "a tree house", "noise", "D", "scenes", pictures[0], "dev"],
        ["8", "Is it noisy?", "", "yes", "no", "", "", "A", "qualities", pictures[1], "dev"],
        ["1000007", "What is on the picture?", "", "noise", "a cat", "a dog", "a tree house", "A", "scenes", "7", "dev"],
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return path


def write_mmmu(path: Path) -> Path:
    """Four rows: one image, two images in other order, images as options, an open question."""
    import pyarrow
    from pyarrow import parquet

    def row(number: int, question: str, options: str, answer: str, images: list[int], kind: str = "multiple-choice") -> dict[str, object]:
        placed = {f"image_{place}": None for place in range(1, 8)}
        placed |= {f"image_{place}": {"bytes": png(seed), "path": f"{seed}.png"} for place, seed in enumerate(images, start=1)}
        name = f"validation_{'Accounting' if number < 3 else 'Art_Theory'}_{number}"
        return {"id": name, "question": question, "options": options, "answer": answer, "question_type": kind} | placed

    rows = [
        row(1, "<image 1> Which sum is it?", "['$6', \"Ann's $7\", '$8']", "B", [3]),
        row(2, "Compare <image 2> with <image 1>.", "['equal', 'other']", "A", [4, 5]),
        row(3, "Which one is noise?", "['<image 1>', '<image 2>']", "B", [6, 7]),
        row(4, "How much is it?", "[]", "7", [8], kind="open"),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
