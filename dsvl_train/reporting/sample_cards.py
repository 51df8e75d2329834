"""Training samples as HTML: their tiles, and their text with the loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsvl_train.reporting.metrics import number
from dsvl_train.reporting.pictures import Pictures
from dsvl_train.reporting.runs import MODALITIES, Run
from dsvl_train.reporting.samples_file import SampleRecord, picture_path
from dsvl_train.reporting.style import CSS

_PICTURE_SIDE = 560
_ENLARGED_SIDE = 240
_PICTURES_PER_SAMPLE = 2
_TEXT_LIMIT = 5000
"""Characters of a sample's text that are shown."""
_SPAN_LIMIT = 1600
"""Of one span; its middle is left out."""
_MASK_NOTE = "Marked text is what the loss is taken over; everything else is context."


def samples_part(run: Run, pictures: Pictures) -> str:
    """The part of a stage's section with the samples of the first and the last step that were kept of each modality; "" without any."""
    shown = _shown_steps(run.samples)
    if not shown:
        return ""
    steps = len({record["step"] for record in run.samples})
    parts = [f'<h3>Samples</h3><p class="note first">What the model was given, from the share of rank 0. {_MASK_NOTE}']
    parts.append(f" samples/ holds those of {steps} steps.</p>" if steps > len(shown) else "</p>")
    for step in shown:
        records = [record for record in run.samples if record["step"] == step]
        parts.append(f"<h4>Step {step:,}, {escape(records[0]['modality'])}</h4>{_cards(records, run.folder, pictures)}")
    return "".join(parts)


def standalone_cards(records: Sequence[SampleRecord], run_dir: Path) -> str:
    """Samples of one step as a piece of HTML with its own style."""
    return f'<style>{CSS}</style><p class="note first">{_MASK_NOTE}</p>{_cards(records, run_dir, Pictures())}'


def title(record: SampleRecord) -> str:
    """Source and sizes of a sample in words."""
    counts = ((record.get("tokens"), "token"), (record.get("supervised_tokens"), "supervised"), (record.get("tiles"), "tile"))
    words = [_count(size, name) for count, name in counts if (size := number(count)) is not None and (size or name != "tile")]
    return ", ".join([str(record.get("source", "sample")), *words])


def _shown_steps(records: Sequence[SampleRecord]) -> list[int]:
    """First and last step of each modality."""
    steps: set[int] = set()
    for modality in MODALITIES:
        of_modality = [record["step"] for record in records if record["modality"] == modality]
        steps |= {min(of_modality), max(of_modality)} if of_modality else set()
    return sorted(steps)


def _cards(records: Sequence[SampleRecord], run_dir: Path, pictures: Pictures) -> str:
    return f'<div class="samples">{"".join(_card(record, run_dir, pictures) for record in records)}</div>'


def _card(record: SampleRecord, run_dir: Path, pictures: Pictures) -> str:
    source, _, sizes = title(record).partition(", ")
    shown = _pictures(record, run_dir, pictures)
    images = f'<div class="images">{shown}</div>' if shown else ""
    return (
        f'<div class="sample"><p class="of"><b>{escape(source)}</b> {escape(sizes)}</p>{images}'
        f'<p class="spans">{"".join(_spans(record["spans"]))}</p></div>'
    )


def _pictures(record: SampleRecord, run_dir: Path, pictures: Pictures) -> str:
    images = record.get("images")
    count = len(images) if isinstance(images, list) else 0
    paths = [path for image in range(count) if (path := picture_path(run_dir, record, image)) is not None]
    words = "global view and local tiles of a training image"
    parts = [pictures.embed([path], _PICTURE_SIDE, words, small=_ENLARGED_SIDE).html for path in paths[:_PICTURES_PER_SAMPLE]]
    if count > len(parts):
        parts.append(f'<span class="missing">{_count(count - len(parts), "more image" if parts else "image")} not shown</span>')
    return "".join(parts)


def _spans(spans: Sequence[dict[str, Any]]) -> Iterator[str]:
    room = _TEXT_LIMIT
    for place, span in enumerate(spans):
        if room <= 0:
            left = sum(int(number(rest.get("tokens")) or 0) for rest in spans[place:])
            yield f'<span class="left-out">… {_count(left, "token")} more</span>'
            return
        text = _shortened(str(span["text"]))
        room -= len(text)
        image = span.get("image") is not None
        words = escape(f"{text} \u00d7{span.get('tokens')}" if image else text)
        look = "image-tokens" if image else "special" if span.get("special") else ""
        tag, kind = "mark" if span.get("supervised") else "span", f' class="{look}"' if look else ""
        yield f"<{tag}{kind}>{words}</{tag}>" if look or tag == "mark" else words


def _shortened(text: str) -> str:
    half = _SPAN_LIMIT // 2
    return text if len(text) <= _SPAN_LIMIT else f"{text[:half]} […] {text[-half:]}"


def _count(count: float, word: str) -> str:
    plural = "" if count == 1 or word == "supervised" else "s"
    return f"{count:,.0f} {word}{plural}"
