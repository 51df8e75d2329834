"""Makes data for tiny runs: `python -m data_recipes.make_tiny --recipe deepseek_vl2_tiny/pretrain --out runs/tiny/data [--samples 24]`.

For every source of the recipe's mixture it writes a few samples of the demo's kinds where the recipe looks for that source under
`data.root`, and the processor and text corpus of the shrunk model; so `python train.py recipe=… shrink=tiny data.root=OUT` runs. What is
there already is left as it is. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from zlib import crc32

from PIL import Image

from data_recipes.demo import samples as demo
from data_recipes.demo.materials import Materials, load_materials
from dsvl_train.config.compose import compose_run
from dsvl_train.config.schema import DataConfig, ModelConfig, SourceConfig

DOCUMENTS = 60
"""Of the text corpus."""
_GLOB = frozenset("*?[{")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", action="append", required=True, metavar="FAMILY/STAGE", help="repeat for several in one folder")
    parser.add_argument("--out", required=True, help="what data.root is to be")
    parser.add_argument("--samples", type=int, default=24, help="samples of each source")
    arguments = parser.parse_args(argv)
    try:
        for recipe in arguments.recipe:
            make(recipe, Path(arguments.out), arguments.samples)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(recipe: str, out: Path, samples: int) -> None:
    """Write what `recipe` with `shrink=tiny` reads under `out`.

    Raises:
        ValueError: no such recipe, or one whose sources do not lie under `data.root`.
    """
    config = compose_run([f"recipe={recipe}", "shrink=tiny", f"data.root={out}"])
    for name, source in config.data.sources.items():
        if not Path(source.path).is_relative_to(out):
            raise ValueError(f"recipe={recipe}: data.sources.{name}.path={source.path} does not lie under data.root ({out})")
    _write_processor(config.model, config.data)
    for name, source in config.data.sources.items():
        if source.kind == "text":
            _write_corpus(Path(source.path), Path(config.data.processor))
        else:
            _write_shards(name, source, config.stage.name, samples)


def shard_folder(path: str) -> Path:
    """A folder whose shards the path of a source finds: `a/*/*.tar` -> `a/tiny`."""
    parts = Path(path).parts
    parts = parts[:-1] if parts[-1].endswith(".tar") else parts
    return Path(*("tiny" if _GLOB.intersection(part) else part for part in parts))


def _write_shards(name: str, source: SourceConfig, stage: str, samples: int) -> None:
    from dsvl_train.data.shards import ShardWriter

    folder = shard_folder(source.path)
    if any(folder.glob("*.tar")):
        return
    kind = "sft_text" if source.modality == "text" else stage
    with ShardWriter(folder, max_samples=-(-samples // 2)) as writer:
        for index in range(samples):
            made = demo.make_sample(kind, index, crc32(name.encode()), _materials())
            writer.write(made.messages, [("png", _png(image)) for image in made.images], meta={"kind": made.kind})


def _write_processor(model: ModelConfig, data: DataConfig) -> None:
    from dsvl_train.data.processor import write_processor_folder
    from dsvl_train.data.tokenizer import train_byte_level_bpe

    folder, siglip = Path(data.processor), model.vision.siglip
    if (folder / "processor_config.json").is_file():
        return
    tokenizer = train_byte_level_bpe(_texts(), model.language.vocab_size)
    if model.family == "vl2":
        ratio = model.adaptor.downsample_ratio
        write_processor_folder("vl2", folder, tokenizer, image_size=siglip.image_size, patch_size=siglip.patch_size, downsample_ratio=ratio)
    else:
        image_size = (model.vision.sam or siglip).image_size
        write_processor_folder("vl", folder, tokenizer, image_size=image_size, tokens_per_image=siglip.tokens)


def _write_corpus(prefix: Path, processor: Path) -> None:
    from dsvl_train.data.processor import Processor
    from dsvl_train.data.text_corpus import write_text_corpus

    if not prefix.with_suffix(".idx").is_file():
        write_text_corpus(prefix, _texts(), Processor.from_folder(processor).tokenizer)


@cache
def _materials() -> Materials:
    train, _ = load_materials()
    return train


def _texts() -> list[str]:
    return [document.text for document in _materials().documents[:DOCUMENTS]]


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main())
