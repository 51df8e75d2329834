"""`dsvl encode`: exactly what a model will see of each sample, as arrays."""

from __future__ import annotations

import argparse
import os
import zipfile
from pathlib import Path

import numpy as np

FIELDS = ("input_ids", "labels", "image_mask", "tiles_wh", "pixels")


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("encode", help="write what a model will see of conversations: ids, labels, masks, tiles")
    parser.add_argument("--model", required=True, help="folder in a released format (no weights needed), checkpoint or run folder")
    parser.add_argument("--samples", required=True, help="JSON list or JSON lines of messages and images; an empty last answer = a prompt")
    parser.add_argument("--out", required=True, help="the .npz to write: i.input_ids, i.labels, i.image_mask, i.tiles_wh, i.pixels")
    add_mask_prompt(parser)
    add_max_tiles(parser)
    parser.set_defaults(run=run)


def add_mask_prompt(parser: argparse.ArgumentParser) -> None:
    """Declare --mask-prompt; it does not follow the model's folder, since the released VL2 folders supervise questions too."""
    parser.add_argument(
        "--mask-prompt",
        choices=["true", "false"],
        default="true",
        help="true: only answers are supervised (the default); false: prompts too",
    )


def add_max_tiles(parser: argparse.ArgumentParser) -> None:
    """Declare --max-tiles."""
    parser.add_argument(
        "--max-tiles",
        type=int,
        help="VL2: local tiles of an image at most (default: as the model was trained; VL2 reads InfoVQA with 18)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Encode sample by sample; the file appears when all are written."""
    from dsvl_train.evaluation.samples import encode_sample, load_processor, read_samples

    out = Path(arguments.out)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name the .npz file to write")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    processor = load_processor(arguments.model, mask_prompt=arguments.mask_prompt == "true", max_tiles=arguments.max_tiles)
    samples = read_samples(arguments.samples)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            for index, sample in enumerate(samples):
                encoded = encode_sample(processor, sample)
                for name in FIELDS:
                    with archive.open(f"{index}.{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, getattr(encoded, name).numpy(), allow_pickle=False)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return 0
