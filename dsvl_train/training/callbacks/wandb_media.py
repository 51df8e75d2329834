"""Samples and answers as Weights & Biases shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsvl_train.reporting.pictures import read_small
from dsvl_train.reporting.sample_cards import standalone_cards, title
from dsvl_train.reporting.samples_file import SampleRecord, picture_path

_SIDE = 384
"""Pixels of a picture's longer side in the table of generations at most."""
_COLUMNS = ("step", "task", "question", "answer", "truth", "score", "picture")


def sample_media(records: Sequence[SampleRecord], run_dir: Path) -> dict[str, Any]:
    """A step's samples: under `samples/MODALITY` as the report draws them, and each picture under `samples/pictures`."""
    import wandb

    media: dict[str, Any] = {}
    for modality in dict.fromkeys(record["modality"] for record in records):
        of_modality = [record for record in records if record["modality"] == modality]
        media[f"samples/{modality}"] = wandb.Html(standalone_cards(of_modality, run_dir))
    pictures = [
        wandb.Image(str(path), caption=f"{title(record)}\n{_marked(record)}")
        for record in records
        for image in range(len(record["images"]))
        if (path := picture_path(run_dir, record, image)) is not None
    ]
    return media | ({"samples/pictures": pictures} if pictures else {})


def generations_table(generations: Sequence[dict[str, Any]]) -> Any:
    """A `wandb.Table` of an evaluation's examples; no picture where it cannot be read."""
    import wandb

    table = wandb.Table(columns=list(_COLUMNS))
    for example in generations:
        table.add_data(*(example.get(column) for column in _COLUMNS[:-1]), _picture(str(example.get("image") or "")))
    return table


def _picture(path: str) -> Any:
    import wandb

    if not path:
        return None
    try:
        return wandb.Image(read_small(Path(path), _SIDE)[0])
    except Exception:  # Pillow's plugins raise whatever a damaged file leads them to
        return None


def _marked(record: SampleRecord) -> str:
    """The text with what is supervised in brackets: a caption has no colours."""
    return "".join(_words(span) for span in record["spans"])


def _words(span: dict[str, Any]) -> str:
    if "image" in span:
        return f"{span['text']} \u00d7{span['tokens']}"
    return f"\u27e6{span['text']}\u27e7" if span["supervised"] else str(span["text"])
