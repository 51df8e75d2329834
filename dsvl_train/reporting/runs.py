"""A run folder as the report sees it: its settings and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsvl_train.reporting.metrics import Record, number, read_metrics, total
from dsvl_train.reporting.samples_file import SampleRecord, read_samples

MODALITIES = ("text", "multimodal")


@dataclass
class Run:
    """One training stage's run."""

    folder: Path
    config: dict[str, Any]
    records: list[Record]
    """The steps in order, each once."""
    evaluations: list[Record] = field(default_factory=list)
    """Evaluations in the loop, likewise: `evaluation.jsonl`."""
    samples: list[SampleRecord] = field(default_factory=list)
    """What it was trained on in some steps."""

    def setting(self, path: str, default: Any = None) -> Any:
        """A setting by its dotted name, as in `config.yaml`; the default where it is missing or null."""
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, dict) or value.get(key) is None:
                return default
            value = value[key]
        return value

    @property
    def stage(self) -> str:
        """The stage's name; the folder's without a config."""
        return str(self.setting("stage.name", self.folder.name))

    @property
    def seconds(self) -> float:
        """Time of the steps and of their waits for data. Checkpoints and start-up are not in it."""
        return total(self.records, "step_s") + total(self.records, "data_wait_s")

    def of(self, modality: str) -> list[Record]:
        return [record for record in self.records if record.get("modality") == modality]

    def column(self, key: str, records: Sequence[Record] | None = None) -> tuple[list[float], list[float | None]]:
        """Steps and values of a number, over all steps that have the key (None where it is null)."""
        kept = [record for record in (self.records if records is None else records) if key in record]
        return [float(record["step"]) for record in kept], [number(record[key]) for record in kept]

    def has(self, key: str) -> bool:
        return any(number(record.get(key)) is not None for record in self.records)


def read_run(folder: Path) -> Run:
    """A run folder's files; config.yaml or metrics.jsonl may be missing (a run that has not begun), and the others.

    Raises FileNotFoundError where the folder itself is missing or holds neither.
    """
    config_path, metrics_path, evaluation_path = (folder / name for name in ("config.yaml", "metrics.jsonl", "evaluation.jsonl"))
    if not config_path.is_file() and not metrics_path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has neither config.yaml nor metrics.jsonl")
    config: Any = OmegaConf.to_container(OmegaConf.load(config_path)) if config_path.is_file() else {}
    records, evaluations = (read_metrics(path) if path.is_file() else [] for path in (metrics_path, evaluation_path))
    return Run(folder, config if isinstance(config, dict) else {}, records, evaluations, read_samples(folder))
