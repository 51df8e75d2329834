"""`dsvl import`: a model folder of others becomes a checkpoint of ours, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

from dsvl_train.checkpoints.folders import CONFIG_FILE, PROCESSOR_FOLDER, STATE_FILE
from dsvl_train.checkpoints.manifest import manifest_of, write_manifest
from dsvl_train.config.compose import to_yaml
from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop import processors
from dsvl_train.interop.formats import transformers_vl
from dsvl_train.interop.formats.json_file import JsonConfig
from dsvl_train.interop.neutral import neutral_run
from dsvl_train.interop.progress import bytes_bar
from dsvl_train.interop.released import open_released
from dsvl_train.interop.writer import whole_folder, write_shards

MAX_SHARD_BYTES = 4 * 2**30


def import_model(source: str | Path, out: str | Path, *, show_progress: bool = True) -> ModelConfig:
    """Write a checkpoint (step 0, no optimiser) of a released model.

    Everything is checked before the first byte is written; the folder gets its name when it is whole.

    Raises:
        ValueError: the source is unknown, broken or does not fit its configuration, or `out` exists; names file and tensor.
    """
    source, out = Path(source), Path(out)
    model, tensors = open_released(source)
    run = neutral_run(model, out.resolve() / PROCESSOR_FOLDER)
    total = sum(info.bytes for info in tensors.infos().values())
    with whole_folder(out) as folder, bytes_bar(f"import {source.name}", total, show_progress) as advance:
        write_shards(folder, tensors, max_bytes=MAX_SHARD_BYTES, prefix="model.", index=False, progress=advance)
        (folder / PROCESSOR_FOLDER).mkdir()
        _write_processor(source, folder / PROCESSOR_FOLDER, model)
        (folder / CONFIG_FILE).write_text(to_yaml(run), encoding="utf-8")
        state = {"step": 0, "data": {}, "updates": {}, "bad_samples": 0}
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_manifest(folder, manifest_of(folder, step=0))
    return model


def _write_processor(source: Path, target: Path, model: ModelConfig) -> None:
    model_type = JsonConfig.read(source / "config.json").values["model_type"]
    if model_type in (transformers_vl.SINGLE, transformers_vl.HYBRID):
        processors.from_transformers(source, target, model)
    else:
        processors.copy_released(source, target)
