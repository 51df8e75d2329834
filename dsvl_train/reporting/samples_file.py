"""`samples/samples.jsonl` of a run folder: what the model was trained on in some steps, an object per sample.

    {"step": 1, "modality": "multimodal", "source": "pretrain", "tokens": 480, "supervised_tokens": 12, "tiles": 5,
     "images": [{"file": "step_00000001_0_0.png", "tiles_wh": [2, 2], "tokens": 421}],
     "spans": [{"text": "<image>", "tokens": 421, "supervised": false, "image": 0},
               {"text": "7", "tokens": 1, "supervised": true}, ...]}

`spans` are the sample's tokens in their order; neighbours of one kind are together, each special token (`"special": true`) is by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = "samples"
FILE = "samples.jsonl"

SampleRecord = dict[str, Any]
"""One line of the file."""


def read_samples(run_dir: Path) -> list[SampleRecord]:
    """The samples of a run, in the order of the file; none without one. Lines that are none are passed over."""
    path = run_dir / FOLDER / FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if _is_record(record):
            records.append(record)
    return records


def picture_path(run_dir: Path, record: SampleRecord, image: int) -> Path | None:
    """The file of a sample's image; None where it has none. Names are taken without folders: a file may say what it likes."""
    images = record.get("images")
    if not isinstance(images, list) or not 0 <= image < len(images) or not isinstance(images[image], dict):
        return None
    name = images[image].get("file")
    return run_dir / FOLDER / name if isinstance(name, str) and name and Path(name).name == name else None


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("modality"), str)
        and isinstance(record.get("spans"), list)
        and all(isinstance(span, dict) and isinstance(span.get("text"), str) for span in record["spans"])
    )
