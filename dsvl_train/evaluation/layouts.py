"""Readers of the files in which benchmarks are published: each takes a path and gives questions.

The files are nobody's word: no pickle is loaded and nothing in them is executed; images stay bytes here and are opened under
data.max_image_pixels, like a sample's.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import re
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dsvl_train.data.errors import SampleError
from dsvl_train.data.sample import find_images, parse_sample
from dsvl_train.data.shards import expand_shards
from dsvl_train.data.tar_scan import Member, MemberGroup, group_members, scan_tar
from dsvl_train.evaluation.prompts import IMAGE, Question, Style, make_item, shots_for
from dsvl_train.evaluation.samples import read_records
from dsvl_train.evaluation.tasks import ACCURACY, PERPLEXITY, Task, TaskItem, read_task

_MAX_FIELD = 1 << 27
"""Characters of a TSV field, a base64 image of 100 MB, and bytes of a shard's member at most."""
_MMMU_IMAGES = 7
_MMMU_IMAGE = re.compile(r"<image (\d)>")
_MAX_LIST = 20_000
"""Characters of a list written as text."""


def open_task(name: str, style: Style | None = None, *, shots: int = 0, shots_from: str | None = None) -> Task:
    """A task file, or a benchmark's own file as `LAYOUT:PATH`, LAYOUT one of `LAYOUTS` or `shards`.

    Args:
        style: how a benchmark's questions are put; a task file says so itself.
        shots: worked examples before each question of a benchmark.
        shots_from: file of the same layout that they come from.

    Raises:
        ValueError: the file is not what its layout says; names the file and the place. FileNotFoundError: no such file.
    """
    layout, _, path = name.partition(":")
    if layout == "shards" and path:
        return Task(PERPLEXITY, list(read_shards(path)))
    if layout not in LAYOUTS or not path:
        if shots:
            raise ValueError(f"{name}: worked examples go with the layouts {', '.join(LAYOUTS)}; a task file writes them into its messages")
        return read_task(name)
    metric, read = LAYOUTS[layout]
    if shots and shots_from is None:
        raise ValueError(f"{name}: {shots} worked examples are wanted, and no file to take them from is named")
    pool = [*read(Path(shots_from))] if shots and shots_from else []
    questions = [*read(Path(path))]
    if not questions:
        raise ValueError(f"{path} holds no question of the layout {layout}")
    style = style or Style()
    return Task(metric, [make_item(question, style, shots_for(question, pool, shots)) for question in questions])


def read_mmlu(path: Path) -> Iterator[Question]:
    """MMLU: CSV without a header, question, four options and the right one's letter; a file or a folder of them, one per subject."""
    for file in _files(path, ".csv"):
        group = re.sub(r"_(test|dev|val)$", "", file.stem)
        for where, row in _rows(file, ","):
            if len(row) != 6:
                raise ValueError(f"{where} has {len(row)} columns; an MMLU row has 6: question, A, B, C, D, answer")
            text, *options, letter = row
            right = _letter(letter, len(options), where)
            yield Question(text, options=options, right=right, topic=group.replace("_", " "), group=group, where=where)


def read_hellaswag(path: Path) -> Iterator[Question]:
    """HellaSwag: JSON lines of `ctx` (or `ctx_a`, `ctx_b`), `endings` and `label`; `activity_label` comes first where there is one.

    WikiHow's marks are taken out (`[header]`, `[step]`; `[title]` ends a sentence), as is customary.
    """
    for where, record in read_records(path):
        first, second = record.get("ctx_a"), record.get("ctx_b")
        context = f"{first} {second[:1].upper()}{second[1:]}" if isinstance(first, str) and isinstance(second, str) else record.get("ctx")
        endings, label = record.get("endings"), str(record.get("label"))
        endings = endings if isinstance(endings, list) else []
        if not isinstance(context, str) or not _are_texts(endings) or not label.isdecimal() or int(label) >= len(endings):
            raise ValueError(f"{where} is not of HellaSwag: it needs the text `ctx`, a list `endings` and the right one's number `label`")
        if isinstance(record.get("activity_label"), str):
            context = f"{record['activity_label']}: {context}"
        options = [_without_marks(ending) for ending in endings]
        yield Question(_without_marks(context), options=options, right=int(label), continues=True, where=where)


def read_gsm8k(path: Path) -> Iterator[Question]:
    """GSM8K: JSON lines of `question` and `answer`, the number after `####`; judged by the last number of what the model writes."""
    for where, record in read_records(path):
        question, answer = record.get("question"), record.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise ValueError(f"{where} is not of GSM8K: it needs the texts `question` and `answer`, with the number after ####")
        yield Question(question, answer=answer, truth=answer.rpartition("####")[2].strip(), where=where)


def read_mmbench(path: Path) -> Iterator[Question]:
    """MMBench: TSV of `question`, `A` … (blank = no such option), `answer`, `image` in base64 or the index of the row that has it, and
    where there are any `hint` and `category`."""
    for file in _files(path, ".tsv"):
        rows = _rows(file, "\t")
        _, header = next(rows, ("", []))
        missing = {"question", "A", "B", "answer", "image"} - set(header)
        if missing:
            raise ValueError(f"{file} is not of MMBench: its header lacks {', '.join(sorted(missing))}")
        images: dict[str, bytes] = {}
        for where, row in rows:
            if len(row) != len(header):
                raise ValueError(f"{where} has {len(row)} columns, the header {len(header)}")
            record = dict(zip(header, row, strict=True))
            options = [record[letter] for letter in string.ascii_uppercase if record.get(letter, "").strip()]
            image = images.get(record["image"]) or _base64(record["image"], where)
            images[record.get("index", "")] = image
            text = "\n".join([IMAGE, *(part for part in (record.get("hint", ""), record["question"]) if part.strip())])
            right = _letter(record["answer"], len(options), where)
            yield Question(text, [image], options, right, group=record.get("category", ""), where=where)


def read_mmmu(path: Path) -> Iterator[Question]:
    """MMMU: parquet of `question`, `options` (a list written as text), `answer`, `image_1` … `image_7` ({bytes, path}), `question_type`
    and `id`, whose middle is the subject; a file or a folder of them. Open questions are left out. `<image 1>` stands where an image goes.

    Raises:
        ValueError: also where pyarrow is not installed.
    """
    for file in _files(path, ".parquet"):
        for where, record in _parquet_rows(file):
            if record.get("question_type", "multiple-choice") != "multiple-choice":
                continue
            options = _written_list(record.get("options"), where)
            images = {f"{number}": (record.get(f"image_{number}") or {}).get("bytes") for number in range(1, _MMMU_IMAGES + 1)}
            texts, used = _place_images([str(record.get("question")), *options], images, where)
            subject = re.fullmatch(r"[a-z]+_(.+)_\d+", str(record.get("id", "")))
            right = _letter(str(record.get("answer")), len(options), where)
            yield Question(texts[0], used, texts[1:], right, group=subject[1] if subject else "", where=where)


def read_shards(pattern: str) -> Iterator[TaskItem]:
    """Held-out samples in webdataset shards, as they are trained on; a folder, a glob or a brace pattern on this machine."""
    for shard in expand_shards(pattern, "shards"):
        scan = scan_tar(shard)
        if scan.damage is not None:
            raise ValueError(f"{shard}: damaged at byte {scan.damage.offset}: {scan.damage.reason}")
        with shard.open("rb") as file:
            for group in group_members(scan.members):
                where = f"{shard}: {group.key}"
                try:
                    yield _shard_item(group, partial(_member, file), where)
                except SampleError as error:
                    raise ValueError(f"{where}: {error}") from error


LAYOUTS: dict[str, tuple[str, Callable[[Path], Iterator[Question]]]] = {
    "mmlu": (ACCURACY, read_mmlu),
    "hellaswag": (ACCURACY, read_hellaswag),
    "mmbench": (ACCURACY, read_mmbench),
    "mmmu": (ACCURACY, read_mmmu),
    "gsm8k": ("last_number", read_gsm8k),
}
"""Layout -> metric and reader."""


# ------------------------------------------------------------------------------------------------------------------- helpers


def _files(path: Path, suffix: str) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.rglob(f"*{suffix}"))
    if not found:
        raise FileNotFoundError(f"{path} is neither a file nor a folder with *{suffix}")
    return found


def _rows(file: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """(place, columns) of every row."""
    with _long_fields(), file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if row:
                    yield f"{file}: line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: after line {reader.line_num}: {error}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module's limit is one for the whole process."""
    before = csv.field_size_limit(_MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{file}: parquet files are read with pyarrow, which is not installed: pip install -e .[eval]") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=16):
                for record in batch.to_pylist():
                    yield f"{file}: row {number}", record
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: row {number}: not parquet that can be read: {error}") from error


def _letter(letter: str, options: int, where: str) -> int:
    right = string.ascii_uppercase.find(letter.strip()) if len(letter.strip()) == 1 else -1
    if options < 2 or not 0 <= right < options:
        last = string.ascii_uppercase[max(options - 1, 0)]
        raise ValueError(f"{where}: the answer must be a letter from A to {last}, of {options} options, found {letter!r:.200}")
    return right


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: the image is neither base64 nor the index of an earlier row: {error}") from error


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) and one.strip() for one in value)


def _without_marks(text: str) -> str:
    return " ".join(re.sub(r"\[[^\]]*\]", "", text.strip().replace(" [title]", ". ")).split())


def _written_list(value: Any, where: str) -> list[str]:
    """A list of texts, also one written as Python writes it."""
    if isinstance(value, str) and len(value) <= _MAX_LIST:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"{where}: `options` is not a list: {error}") from error
    if not _are_texts(value):
        raise ValueError(f"{where}: `options` must be a list of at least two texts, found {value!r:.200}")
    return value


def _place_images(texts: list[str], images: dict[str, bytes | None], where: str) -> tuple[list[str], list[bytes]]:
    """Texts with `IMAGE` where they name an image, and the images in that order."""
    used = [images.get(number) for text in texts for number in _MMMU_IMAGE.findall(text)]
    if any(image is None for image in used):
        raise ValueError(f"{where} names an image that it does not have")
    return [_MMMU_IMAGE.sub(IMAGE, text) for text in texts], [image for image in used if image is not None]


def _shard_item(group: MemberGroup, read: Callable[[Member], bytes], where: str) -> TaskItem:
    text = group.members.get("json")
    if text is None or group.repeated is not None:
        raise SampleError("bad_json", "there is no .json member, or a member occurs twice")
    sample = parse_sample(read(text))
    others = {extension: member for extension, member in group.members.items() if extension != "json"}
    places = find_images(sample.images, group.key, list(others))
    members = list(others.values())
    return TaskItem(sample.messages, [read(members[place]) for place in places], where=where)


def _member(file: BinaryIO, member: Member) -> bytes:
    if member.size > _MAX_FIELD:
        raise SampleError("too_large", f"{member.name} has {member.size} bytes; a member may have {_MAX_FIELD}")
    file.seek(member.offset)
    return file.read(member.size)
