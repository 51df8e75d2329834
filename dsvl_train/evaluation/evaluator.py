"""Runs tasks on a model, on one process or on all ranks of a run.

A question with options: each option is scored as the answer, and the one with the lowest perplexity per token is the model's choice
(VL §3.2.2, §4.2); its end token does not count, so that what is compared is the options' own text. Held-out samples: perplexity over all
their supervised tokens, per group and together. Generation is greedy. Held-out text: bits per byte.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.data.errors import SampleError
from dsvl_train.data.processor import Encoded
from dsvl_train.evaluation.generation import generate
from dsvl_train.evaluation.loading import LoadedModel
from dsvl_train.evaluation.ranks import Ranks
from dsvl_train.evaluation.scorers import best_score, bits_per_byte
from dsvl_train.evaluation.scoring import Pack, Question, packs, perplexity, score_pack, score_through_pipeline
from dsvl_train.evaluation.tasks import ACCURACY, BITS_PER_BYTE, PERPLEXITY, Task, TaskItem, TaskResult

_PIPELINE_FILL = 4
"""Packs per pipeline rank that go through a pipeline together."""


@dataclass
class Evaluator:
    """A model with all that it takes to judge it."""

    loaded: LoadedModel
    ranks: Ranks
    max_new_tokens: int = 64
    tokens_at_once: int = 8192
    """Tokens of a forward pass that scores."""
    batch: int = 32
    """Answers generated together."""
    progress: bool = False

    def run(self, name: str, task: Task) -> TaskResult:
        """Judge the model by a task; all ranks of the run call this together, and all get the result.

        Raises:
            ValueError: an item cannot be used, or the layout cannot generate; names the item.
            EvaluationStopped: a rank wished to stop.
        """
        if task.metric == ACCURACY:
            return self._choose(name, task)
        if task.metric == PERPLEXITY:
            return self._measure(name, task)
        return self._answer(name, task)

    def check(self, task: Task) -> None:
        """Make the tensors of this rank's items and forget them, so that what is wrong with one is known now and not hours later.

        Raises:
            ValueError: see `run`.
        """
        if task.generates:
            self._require_no_pipeline()
            for item in self._mine(task, self.ranks.answered_here(len(task.items))):
                self._prompt(item[1])
        else:
            for _ in self._questions(task):
                pass

    def bits_per_byte(self, texts: Sequence[str]) -> TaskResult:
        """Total negative log-likelihood of the texts in bits, over their UTF-8 bytes.

        A text longer than data.seq_len is cut, and each piece starts from the beginning-of-text token alone, so the figure does not depend
        on how texts are packed.
        """
        loss_n1, _ = self._score("text", len(texts), 1, self._pieces(texts), images=False)
        value = bits_per_byte(float(loss_n1.sum()), sum(len(text.encode()) for text in texts))
        return TaskResult(BITS_PER_BYTE, value, len(texts))

    # -------------------------------------------------------------------------------------------------------------- scoring

    def _choose(self, name: str, task: Task) -> TaskResult:
        most = max(len(item.options) for item in task.items)
        loss_no, tokens_no = self._score(name, len(task.items), most, self._questions(task), task.has_images)
        examples = []
        for item, losses, tokens in zip(task.items, loss_no.tolist(), tokens_no.tolist(), strict=True):
            means = [loss / count for loss, count in zip(losses, tokens, strict=True) if count]
            chosen = min(range(len(means)), key=means.__getitem__) if all(map(math.isfinite, means)) else None
            answer = "" if chosen is None else item.options[chosen].strip()
            example = _example(item, answer, item.options[item.right].strip(), float(chosen == item.right))
            examples.append(example | {"choice": chosen, "perplexities": [perplexity(mean, 1) for mean in means]})
        return _mean_result(task, examples)

    def _measure(self, name: str, task: Task) -> TaskResult:
        loss_n1, tokens_n1 = self._score(name, len(task.items), 1, self._questions(task), task.has_images)
        pairs = list(zip(loss_n1[:, 0].tolist(), tokens_n1[:, 0].tolist(), strict=True))
        groups = {}
        for group, numbers in _by_group(task).items():
            groups[group] = (perplexity(math.fsum(pairs[i][0] for i in numbers), math.fsum(pairs[i][1] for i in numbers)), len(numbers))
        score = perplexity(math.fsum(loss for loss, _ in pairs), math.fsum(tokens for _, tokens in pairs))
        examples = [
            _example(item, "", "", perplexity(loss, tokens)) | {"tokens": int(tokens)}
            for item, (loss, tokens) in zip(task.items, pairs, strict=True)
        ]
        return TaskResult(PERPLEXITY, score, len(task.items), groups, examples)

    def _score(self, name: str, items: int, most: int, questions: Iterable[Question], images: bool) -> tuple[Tensor, Tensor]:
        """Loss sums and supervised tokens of each item's samples [items, most], float64, the same on every rank."""
        table = torch.zeros(2, items, most, dtype=torch.float64)
        first = next(questions := iter(questions), None)
        queue = packs(itertools.chain([] if first is None else [first], questions), self.tokens_at_once)
        spare = [first or self._spare()]
        for batch, counted in self._rounds(name, queue, spare, items):
            for question, scores in zip(itertools.chain(*batch[:counted]), itertools.chain(*self._forward(batch, images)), strict=False):
                for number, score in enumerate(scores, start=question.first):
                    column = min(number, most - 1)
                    table[0, question.item, column] += score.loss_sum
                    table[1, question.item, column] += score.tokens
        loss, tokens = self.ranks.total(table, self.ranks.speaks)
        return loss, tokens

    def _rounds(self, name: str, queue: Iterator[Pack], spare: Pack, items: int) -> Iterator[tuple[list[Pack], int]]:
        """(packs, how many of them count), as often on every rank and as many."""
        at_once = _PIPELINE_FILL * self.ranks.pp if self.ranks.pp > 1 else 1
        with self._progress(name, items) as bar:
            while True:
                batch = list(itertools.islice(queue, at_once))
                most = self.ranks.most(len(batch))
                if most == 0:
                    return
                self.ranks.pulse(f"evaluating {name}")
                wanted = most if self.ranks.pp == 1 else max(most, self.ranks.pp)
                yield batch + [spare] * (wanted - len(batch)), len(batch)
                bar.update(len({question.item for pack in batch for question in pack}))

    def _forward(self, batch: list[Pack], images: bool) -> list[list[list[Any]]]:
        if self.ranks.pp > 1:
            return score_through_pipeline(self.loaded, batch, images=images)
        return [score_pack(self.loaded, pack) for pack in batch]

    def _questions(self, task: Task) -> Iterator[Question]:
        """This rank's items to score, encoded."""
        processor = self.loaded.processor
        for number, item in self._mine(task, self.ranks.scored_here(len(task.items))):
            try:
                if item.options:
                    samples = processor.encode_answers(item.messages, item.images, item.options)
                else:
                    samples = [processor.encode(item.messages, item.images)]
            except SampleError as error:
                raise ValueError(f"{item.where}: {error}") from error
            for sample in samples:
                self._check_length(item, len(sample.input_ids))
                if not bool((sample.labels[1:] != IGNORE_INDEX).any()):
                    raise ValueError(f"{item.where}: there is no token to score in {item.options or item.messages!r:.200}")
            yield Question(number, samples)

    def _pieces(self, texts: Sequence[str]) -> Iterator[Question]:
        tokenizer, longest = self.loaded.processor.tokenizer, self.loaded.cfg.data.seq_len - 1
        for number in self.ranks.scored_here(len(texts)):
            ids = tokenizer.encode(texts[number])
            for start in range(0, len(ids), longest):
                piece = torch.tensor([tokenizer.bos_id, *ids[start : start + longest]])
                yield Question(number, [_text_sample(piece)])

    def _spare(self) -> Question:
        """What a rank without items of its own passes through the model with the others."""
        bos = self.loaded.processor.tokenizer.bos_id
        return Question(0, [_text_sample(torch.tensor([bos, bos]))])

    # ----------------------------------------------------------------------------------------------------------- generation

    def _answer(self, name: str, task: Task) -> TaskResult:
        self._require_no_pipeline()
        mine = iter(list(self._mine(task, self.ranks.answered_here(len(task.items)))))
        table = torch.zeros(len(task.items), self.max_new_tokens, dtype=torch.int64)  # ids + 1; 0 = the answer is over
        with self._progress(name, len(task.items)) as bar:
            while True:
                group = list(itertools.islice(mine, self.batch))
                if self.ranks.most(len(group)) == 0:
                    break
                self.ranks.pulse(f"evaluating {name}")
                prompts = [self._prompt(item) for _, item in group]
                answers = generate(self.loaded, prompts, self.max_new_tokens, agree=self._agree)
                for (number, _), ids in zip(group, answers, strict=True):
                    table[number, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
                bar.update(len(group))
        table = self.ranks.total(table, self.ranks.speaks_for_answers)
        examples = []
        for item, row in zip(task.items, table.tolist(), strict=True):
            answer = self.loaded.processor.tokenizer.decode([token - 1 for token in row if token]).strip()
            if item.stop:
                answer = answer.partition(item.stop.strip())[0].strip()
            examples.append(_example(item, answer, " | ".join(item.truths), best_score(task.metric, answer, item.truths)))
        return _mean_result(task, examples)

    def _agree(self, tokens: list[int]) -> list[int]:
        return self.ranks.agree(tokens)

    def _prompt(self, item: TaskItem) -> Encoded:
        plain = item.messages[-1]["role"] == "document"
        messages = item.messages if plain else [*item.messages, {"role": "assistant", "content": ""}]
        try:
            prompt = self.loaded.processor.encode(messages, item.images, inference=True)
        except SampleError as error:
            raise ValueError(f"{item.where}: {error}") from error
        self._check_length(item, len(prompt.input_ids))
        return prompt

    def _require_no_pipeline(self) -> None:
        if self.ranks.pp > 1:
            raise ValueError(
                f"answers cannot be generated in a pipeline (parallel.pp={self.ranks.pp}): give tasks with options or held-out samples, "
                "which are scored, or evaluate the checkpoints with dsvl eval"
            )

    # -------------------------------------------------------------------------------------------------------------- helpers

    def _mine(self, task: Task, numbers: range) -> Iterator[tuple[int, TaskItem]]:
        return ((number, task.items[number]) for number in numbers)

    def _check_length(self, item: TaskItem, tokens: int) -> None:
        most = self.loaded.cfg.model.language.max_positions
        if tokens > most:
            raise ValueError(f"{item.where} has {tokens} tokens; the model takes {most} (model.language.max_positions)")

    def _progress(self, name: str, items: int) -> Any:
        shown = self.progress and self.ranks.is_main
        return tqdm(total=-(-items // self.ranks.dp_size), desc=name, leave=False, disable=None if shown else True)


def _text_sample(piece_t: Tensor) -> Encoded:
    """A text that starts with the beginning-of-text token, all of it supervised but that."""
    return Encoded(piece_t, piece_t, torch.zeros_like(piece_t, dtype=torch.bool), torch.empty(0, 2), torch.empty(0), 0)


def _example(item: TaskItem, answer: str, truth: str, score: float) -> dict[str, Any]:
    first = item.images[0] if item.images else ""
    return {
        "question": item.messages[-1]["content"] if item.truths or item.options else item.messages[0]["content"],
        "image": "" if isinstance(first, bytes) else str(first),
        "answer": answer,
        "truth": truth,
        "score": score,
        **({"group": item.group} if item.group else {}),
    }


def _by_group(task: Task) -> dict[str, list[int]]:
    """Group -> numbers of its items; nothing where no item has a group."""
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(task.items):
        groups.setdefault(item.group or "other", []).append(number)
    return groups if any(item.group for item in task.items) else {}


def _mean_result(task: Task, examples: list[dict[str, Any]]) -> TaskResult:
    def mean(numbers: Sequence[int]) -> float:
        return math.fsum(examples[number]["score"] for number in numbers) / len(numbers)

    groups = {group: (mean(numbers), len(numbers)) for group, numbers in _by_group(task).items()}
    return TaskResult(task.metric, mean(range(len(examples))), len(examples), groups, examples)
