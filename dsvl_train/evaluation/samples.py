"""Conversations in a file, and the processor of a model folder: what a model will see, without its weights.

Nothing here needs megatron-core.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsvl_train.checkpoints import folders
from dsvl_train.config.compose import load_run_config
from dsvl_train.data.conversation import ROLES
from dsvl_train.data.errors import SampleError
from dsvl_train.data.processor import Encoded, Processor
from dsvl_train.interop import processors
from dsvl_train.interop.formats import transformers_vl
from dsvl_train.interop.formats.json_file import JsonConfig
from dsvl_train.interop.released import read_model


@dataclass(frozen=True)
class FileSample:
    """One conversation of a samples file."""

    messages: list[dict[str, str]]
    """Roles as the file spells them: ours, or either released family's."""
    images: list[Path]
    where: str
    """File and index, for messages."""

    @property
    def is_prompt(self) -> bool:
        """Whether the last answer is empty, so that it is for the model to give."""
        return ROLES.get(self.messages[-1]["role"]) == "assistant" and not self.messages[-1]["content"].strip()


def read_samples(path: str | Path) -> list[FileSample]:
    """Read a JSON list, or JSON lines, of objects with `messages` and `images`; image paths are relative to the file.

    `images` may also stand in the messages, as in the released families' examples.

    Raises:
        ValueError: the file is not that; names file and sample index (from 0).
        FileNotFoundError: no such file.
    """
    return [parse_sample(record, Path(path), where) for where, record in read_records(path)]


def read_records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Objects of a JSON list, or of JSON lines, each with its place for messages.

    Raises:
        ValueError: the file is not that, or holds nothing; names file and sample index (from 0).
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file of samples")
    try:
        records = list(_records(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no sample")
    placed = [(f"{path}: sample {index}", record) for index, record in enumerate(records)]
    for where, record in placed:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a {type(record).__name__}; expected an object")
    return placed


def as_prompt(sample: FileSample) -> FileSample:
    """The conversation up to the answer that the model is to give: the empty last one, or one after the user's last turn.

    Raises:
        ValueError: the last message is an answer already; names file and sample.
    """
    role = ROLES.get(sample.messages[-1]["role"])
    if sample.is_prompt or role == "document":
        return sample
    if role != "user":
        raise ValueError(f"{sample.where}: nothing to answer; end with the user's question, or with an empty message of the assistant")
    return replace(sample, messages=[*sample.messages, {"role": "assistant", "content": ""}])


def encode_sample(processor: Processor, sample: FileSample, *, inference: bool | None = None) -> Encoded:
    """Make a sample's tensors; None decides `inference` by whether its last answer is empty.

    Raises:
        ValueError: the sample cannot be used; names file, sample and reason.
    """
    try:
        return processor.encode(sample.messages, sample.images, inference=sample.is_prompt if inference is None else inference)
    except SampleError as error:
        raise ValueError(f"{sample.where}: {error}") from error


def load_processor(path: str | Path, *, mask_prompt: bool = True, max_tiles: int | None = None) -> Processor:
    """The processor of a model folder: a released format's or transformers' (no weights needed), a checkpoint of ours, or a run folder.

    A checkpoint tiles as its run did, a released folder as it says itself, unless `max_tiles` says otherwise (VL2 evaluates images of
    extreme aspect ratios with 18). `mask_prompt` is ours to choose: the released VL2 folders say false, which would supervise the questions
    too.

    Raises:
        ValueError, FileNotFoundError: no such folder, or a file or key is missing; names it. Or `max_tiles` for a model without tiles.
    """
    processor = _load_processor(Path(path), mask_prompt, max_tiles)
    if max_tiles is not None and processor.family == "vl":
        raise ValueError(f"--max-tiles {max_tiles}: {path} is of the VL family, which makes one square of an image; leave the option out")
    return processor


def _load_processor(path: Path, mask_prompt: bool, max_tiles: int | None) -> Processor:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    if any((path / name).is_file() for name in ("config.json", "processor_config.json")):  # ours lie a folder deeper
        if _model_type(path) in (transformers_vl.SINGLE, transformers_vl.HYBRID):
            return _processor_of_transformers(path, mask_prompt)
        return Processor.from_folder(path, mask_prompt=mask_prompt, max_tiles=max_tiles)
    folder = folders.resolve(path)
    data = load_run_config(folder / folders.CONFIG_FILE).data
    return Processor.from_folder(
        folder / folders.PROCESSOR_FOLDER,
        mask_prompt=mask_prompt,
        tile_selection=data.tile_selection,
        max_tiles=data.max_tiles if max_tiles is None else max_tiles,
        tiling_image_limit=data.tiling_image_limit,
        max_image_pixels=data.max_image_pixels,
    )


def _model_type(path: Path) -> Any:
    file = path / "config.json"
    return JsonConfig.read(file).values.get("model_type") if file.is_file() else None


def _processor_of_transformers(path: Path, mask_prompt: bool) -> Processor:
    """transformers lays the same settings out otherwise; they are read through a copy in the released layout."""
    model = read_model(path)
    with tempfile.TemporaryDirectory() as folder:
        processors.from_transformers(path, Path(folder), model)
        return Processor.from_folder(folder, mask_prompt=mask_prompt)


def _records(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a JSON list: {error}") from error
        return
    index = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: sample {index} (line {number}) is not JSON: {error}") from error
        index += 1


def parse_sample(record: Mapping[str, Any], path: Path, where: str) -> FileSample:
    """The conversation and image files of an object.

    Raises:
        ValueError: a field is missing or wrong, or an image is not a file beside `path`; says `where`.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: `messages` must be a list of objects with `role` and `content`, at least one")
    for position, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: message {position} must have the texts `role` and `content`, found {message!r:.200}")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: message {position} has the unknown role {message['role']!r}; known are {', '.join(ROLES)}")
    images: list[str] = []
    for named in [record["images"]] if "images" in record else [message.get("images", []) for message in messages]:
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise ValueError(f"{where}: `images` must be a list of file names, found {named!r:.200}")
        images += named
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return FileSample(turns, _image_files(images, path.parent, where), where)


def _image_files(names: Sequence[str], folder: Path, where: str) -> list[Path]:
    files = [folder / name for name in names]
    for name, file in zip(names, files, strict=True):
        try:
            found = file.is_file()
        except OSError:  # such as a name that is too long
            found = False
        if not found:
            raise ValueError(f"{where}: image {name!r:.200} is not a file in {folder}")
    return files
