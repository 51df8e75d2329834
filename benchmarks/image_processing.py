"""Images per second and core, from JPEG bytes to tiles: `data.decode=exact` and `fast` against the released DeepSeek-VL2 processor's way.

The released way is written out below as its `tokenize_with_images` goes: Pillow decodes, `ImageOps.pad` makes the thumbnail and the local
view, every tile is cropped, turned into a float tensor and normalised (torchvision's ToTensor and Normalize, here in the same torch
calls), the tiles are stacked, and `batchify`, which its `__call__` always ends with, stacks the samples. Ours end where the vision tower
takes over too: with the uint8 tiles laid into a micro-batch (the tower normalises them on its device). All see the same made JPEGs
in turn, on one core, so that a busy machine is equally unfair to each. "at first" is `exact` in a process that has not resized for long
enough to have the kernels of `data/bicubic.py` compiled.

python benchmarks/image_processing.py [--images 60] [--rounds 3]
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dsvl_train.config.geometry import candidate_resolutions, select_tiles
from dsvl_train.data import tiling
from dsvl_train.data.bicubic import Switch
from dsvl_train.data.tiling import Decode, fill_vl2_tiles, open_image

SIDE = 384
CANDIDATES = tuple(candidate_resolutions(SIDE, 9))
GREY = (127, 127, 127)
MEAN = STD = (0.5, 0.5, 0.5)


def made_jpeg(rng: np.random.Generator) -> bytes:
    """A smooth picture with some grain and sharp edges: log-normal area of mean 0.75 megapixels, sides 1:3 to 3:1, quality 75 to 95."""
    area = float(np.clip(rng.lognormal(np.log(0.47e6), 1.0), 0.02e6, 5e6))
    ratio = float(np.exp(rng.uniform(-0.8, 0.8)))
    width, height = max(int((area * ratio) ** 0.5), 32), max(int((area / ratio) ** 0.5), 32)
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    picture += rng.normal(0, 3, (height, width, 1))
    for _ in range(6):
        left, top = int(rng.integers(0, width - 16)), int(rng.integers(0, height - 16))
        picture[top : top + height // 5, left : left + width // 5] = rng.integers(0, 256, 3)
    stream = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=int(rng.integers(75, 96)))
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------ the stated peer


def to_tensor(image: Image.Image) -> Tensor:
    """torchvision.transforms.ToTensor of an RGB image."""
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(image.height, image.width, 3)
    return pixels.permute((2, 0, 1)).contiguous().to(torch.get_default_dtype()).div(255)


def normalise(tile_chw: Tensor) -> Tensor:
    """torchvision.transforms.Normalize(0.5, 0.5), not in place."""
    tile_chw = tile_chw.clone()
    mean, std = (torch.as_tensor(values, dtype=tile_chw.dtype) for values in (MEAN, STD))
    if (std == 0).any():
        raise ValueError("zero")
    return tile_chw.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def released(content: bytes, tiles_wh: tuple[int, int]) -> Tensor:
    """Normalised tiles [1, n, 3, side, side] as the released processor makes them of a sample with one image."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    width, height = tiles_wh[0] * SIDE, tiles_wh[1] * SIDE
    tiles = [normalise(to_tensor(ImageOps.pad(image, (SIDE, SIDE), color=GREY)))]
    local = ImageOps.pad(image, (width, height), color=GREY)
    for top in range(0, height, SIDE):
        for left in range(0, width, SIDE):
            tiles.append(normalise(to_tensor(local.crop((left, top, left + SIDE, top + SIDE)))))
    of_the_sample = torch.stack(tiles)
    return torch.stack([of_the_sample])


# ----------------------------------------------------------------------------------------------------------------------- ours


def ours(content: bytes, tiles_wh: tuple[int, int], decode: Decode) -> NDArray[np.uint8]:
    """uint8 tiles [n, 3, side, side] as the loader makes them and lays them out."""
    pixels_nchw = np.empty((1 + tiles_wh[0] * tiles_wh[1], 3, SIDE, SIDE), dtype=np.uint8)
    fill_vl2_tiles(open_image(content, 10**8), tiles_wh, SIDE, GREY, pixels_nchw, decode)
    return np.concatenate([pixels_nchw])


BEFORE, AFTER = Switch(after_s=float("inf")), Switch(after_s=0.0)
"""Of Pillow's resizing and the kernels."""


def ours_with(switch: Switch, content: bytes, tiles_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """As `ours` in exact mode, at a known side of the switch."""
    tiling.SWITCH = switch
    return ours(content, tiles_wh, "exact")


def largest_difference(
    images: list[bytes], grids: list[tuple[int, int]], way: Callable[[bytes, tuple[int, int]], NDArray[np.uint8]]
) -> int:
    """Over all values of all tiles, in units of 1/255 of the released pixels before normalisation."""
    largest = 0
    for content, grid in zip(images, grids, strict=True):
        theirs = ((released(content, grid)[0] * 0.5 + 0.5) * 255).round().to(torch.int16)
        mine = torch.from_numpy(way(content, grid)).to(torch.int16)
        largest = max(largest, int((theirs - mine).abs().max()))
    return largest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(arguments.seed)
    images = [made_jpeg(rng) for _ in range(arguments.images)]
    sizes = [Image.open(io.BytesIO(content)).size for content in images]
    grids = [select_tiles(size, SIDE, CANDIDATES, "released") for size in sizes]
    megapixels = np.mean([width * height for width, height in sizes]) / 1e6
    kilobytes = np.mean([len(content) for content in images]) / 1e3
    local = np.mean([wide * high for wide, high in grids])
    print(f"{len(images)} JPEGs, mean {megapixels:.2f} megapixels, {kilobytes:.0f} kB, {local:.1f} tiles and a thumbnail; one core")

    started = time.process_time()
    AFTER.load()
    print(f"kernels compiled in {time.process_time() - started:.1f} s, once per process; they serve: {AFTER.kernels_serve()}")

    ways: dict[str, Callable[[bytes, tuple[int, int]], Any]] = {
        "released": released,
        "exact": lambda content, grid: ours_with(AFTER, content, grid),
        "at first": lambda content, grid: ours_with(BEFORE, content, grid),
        "fast": lambda content, grid: ours(content, grid, "fast"),
    }
    seconds = {name: [0.0] * len(images) for name in ways}
    for round_ in range(arguments.rounds + 1):
        for number, (content, grid) in enumerate(zip(images, grids, strict=True)):
            for name, way in ways.items():
                started = time.process_time()
                way(content, grid)
                spent = time.process_time() - started
                if round_:  # the first round warms caches up
                    seconds[name][number] += spent
    total = {name: sum(values) / arguments.rounds for name, values in seconds.items()}
    for name, spent in total.items():
        note = "" if name == "released" else f", {total['released'] / spent:4.2f} times the released way"
        if name != "released":
            note += f", largest difference {largest_difference(images, grids, ways[name])}/255"
        print(f"{name:9} {1e3 * spent / len(images):6.1f} ms per image, {len(images) / spent:5.1f} images/s{note}")


if __name__ == "__main__":
    main()
