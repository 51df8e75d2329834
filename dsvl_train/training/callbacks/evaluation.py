"""Evaluation in the loop: tasks and held-out text every so many steps, on all ranks, leaving training as it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

from dsvl_train.config.errors import ConfigError
from dsvl_train.config.schema import RunConfig
from dsvl_train.data.loader import open_processor
from dsvl_train.evaluation.evaluator import Evaluator
from dsvl_train.evaluation.language_modelling import read_texts
from dsvl_train.evaluation.layouts import open_task
from dsvl_train.evaluation.loading import LoadedModel
from dsvl_train.evaluation.prompts import Style
from dsvl_train.evaluation.ranks import EvaluationStopped, Ranks
from dsvl_train.evaluation.tasks import BITS_PER_BYTE, PERPLEXITY, Task, TaskResult, spread
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.startup import World
from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView
from dsvl_train.training.callbacks.metrics_file import MetricsFile

_log = logging.getLogger(__name__)

FILE = "evaluation.jsonl"
_EXAMPLES = 8
"""Of each task, in that file."""


class Evaluation(Callback):
    """Adds `eval/TASK`, `eval/TASK/GROUP`, `eval/bits_per_byte` and `eval/seconds` to the metrics of the steps after which it evaluates,
    and writes them with some examples to `evaluation.jsonl`, an object per step. A wish to stop the run ends an evaluation, whose scores
    are then left out.

    Args:
        pulse: told, with the step, what begins.
        wants_stop: whether this rank was asked to stop.
        whole_weights: a context for the model's use, from the optimiser that trains it.

    Raises:
        ConfigError: a task or text cannot be used; every rank makes the tensors of its items once to know.
    """

    def __init__(
        self,
        cfg: RunConfig,
        world: World,
        model: VisionLanguageModel,
        pulse: Callable[[int, str], None],
        wants_stop: Callable[[], bool],
        whole_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._step, self._whole_weights = 0, whole_weights
        processor = open_processor(replace(cfg.data, mask_prompt=True))
        ranks = Ranks(world, cfg.parallel, lambda phase: pulse(self._step, phase), wants_stop)
        loaded = LoadedModel(cfg, world, model, processor)
        self._evaluator = Evaluator(loaded, ranks, cfg.eval.max_new_tokens, cfg.eval.tokens_at_once)
        self._tasks = {name: self._open(cfg, name, source) for name, source in cfg.eval.tasks.items()}
        self._texts = self._open_text(cfg)
        self.generations: list[dict[str, Any]] = []
        """The examples of the last step that have an answer, each with its step and task; mostly none."""
        self._file = MetricsFile(FILE)

    def on_run_start(self, trainer: TrainerView) -> None:
        self._file.on_run_start(trainer)

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        self.generations = []
        if trainer.step % trainer.cfg.eval.every and trainer.step != trainer.cfg.run.max_steps:
            return
        self._step, started = trainer.step, time.perf_counter()
        try:
            with self._whole_weights(), undisturbed(self._evaluator.loaded.model):
                results = {name: self._evaluator.run(name, task) for name, task in self._tasks.items()}
                text = self._evaluator.bits_per_byte(self._texts) if self._texts else None
        except EvaluationStopped:
            if trainer.is_main:
                _log.warning("step %d: the evaluation is left out, since the run was asked to stop", trainer.step)
            return
        seconds = time.perf_counter() - started
        metrics.update(_flat(results, text) | {"eval/seconds": seconds})
        record: dict[str, Any] = {"step": trainer.step, "seconds": seconds, "tasks": {}}
        for name, result in results.items():
            examples = [_at_home_anywhere(example) for example in result.examples[:_EXAMPLES]]
            record["tasks"][name] = result.summary() | {"examples": examples}
            if result.metric != PERPLEXITY:
                self.generations += [{"step": trainer.step, "task": name, **example} for example in examples]
        if text is not None:
            record[BITS_PER_BYTE] = text.score
        self._file.on_step_end(trainer, record)

    def on_run_end(self, trainer: TrainerView, reason: str) -> None:
        self._file.on_run_end(trainer, reason)

    def on_exception(self, trainer: TrainerView, error: BaseException) -> None:
        self._file.on_exception(trainer, error)

    def _open(self, cfg: RunConfig, name: str, source: str) -> Task:
        try:
            task = open_task(source, Style(cfg.eval.plain, cfg.eval.options))
            task = Task(task.metric, spread(task.items, cfg.eval.limit))
            self._evaluator.check(task)
        except (ValueError, OSError) as error:
            raise ConfigError(f"eval.tasks.{name}", f"must be a task that this run can evaluate: {error}", value=source) from error
        return task

    def _open_text(self, cfg: RunConfig) -> list[str]:
        try:
            return spread(read_texts(cfg.eval.text), cfg.eval.limit) if cfg.eval.text else []
        except (ValueError, OSError) as error:
            raise ConfigError("eval.text", f"must be a file of documents: {error}", value=cfg.eval.text) from error


@contextmanager
def undisturbed(model: VisionLanguageModel) -> Iterator[None]:
    """The model in evaluation mode; afterwards its modules' modes and the random number generators are what they were.

    Nothing else remembers an evaluation: routers count with gradients only, and evaluation draws no random number.
    """
    modes = [(module, module.training) for chunk in model.chunks.values() for module in chunk.modules()]
    tracker = tensor_parallel.get_cuda_rng_tracker()
    generators, on_cpu = tracker.get_states(), torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    for chunk in model.chunks.values():
        chunk.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        tracker.set_states(generators)
        torch.set_rng_state(on_cpu)
        if on_cuda is not None:
            torch.cuda.set_rng_state(on_cuda)


def _at_home_anywhere(example: dict[str, Any]) -> dict[str, Any]:
    """With the picture's whole path: whoever reads the file need not stand where the run was started."""
    return example | {"image": str(Path(example["image"]).absolute()) if example["image"] else ""}


def _flat(results: dict[str, TaskResult], text: TaskResult | None) -> Metrics:
    flat: Metrics = {}
    for name, result in results.items():
        flat[f"eval/{name}"] = result.score
        flat |= {f"eval/{name}/{group}": score for group, (score, _) in result.groups.items()}
    return flat if text is None else flat | {f"eval/{BITS_PER_BYTE}": text.score}
