"""Scores of `dsvl eval`'s evaluator against a plain loop over transformers on the exported model, on made samples of every layout."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dsvl_train.evaluation.layouts import open_task
from dsvl_train.evaluation.prompts import Style
from dsvl_train.evaluation.tasks import Task, TaskItem
from dsvl_train.interop.exporter import export_model
from dsvl_train.interop.importer import import_model
from dsvl_train.parallel import startup
from tests.made_benchmarks import write_gsm8k, write_hellaswag, write_mmbench, write_mmlu, write_mmmu
from tests.made_models import write_multi_modality
from tests.tiny import tiny_run

TOLERANCE = 1e-4
"""Relative, of perplexities. Worst seen: 6e-7."""


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    cfg = tiny_run("vl")
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    yield world
    startup.stop()


@pytest.fixture(scope="module")
def folders(world: startup.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours`, `theirs` (the export, for transformers) and the benchmark files."""
    folder = tmp_path_factory.mktemp("evaluation")
    import_model(write_multi_modality(folder / "released", hybrid=False), folder / "ours")
    export_model(folder / "ours", folder / "theirs", "transformers")
    write_mmlu(folder / "mmlu")
    write_hellaswag(folder / "hellaswag.jsonl")
    write_gsm8k(folder / "gsm8k.jsonl")
    write_mmbench(folder / "mmbench.tsv")
    write_mmmu(folder / "mmmu.parquet")
    return folder


@pytest.fixture(scope="module")
def loop(folders: Path) -> PlainLoop:
    return PlainLoop(folders / "theirs")


def evaluator(folders: Path, world: startup.World, **options: Any) -> Any:
    from dsvl_train.evaluation.evaluator import Evaluator
    from dsvl_train.evaluation.loading import load_model
    from dsvl_train.evaluation.ranks import Ranks

    loaded = load_model(folders / "ours", world)
    return Evaluator(loaded, Ranks(world, loaded.cfg.parallel), **options)


class PlainLoop:
    """transformers alone: its processor, its chat template, its model, one option at a time."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = transformers.DeepseekVLForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def prompt(self, item: Any) -> str:
        if item.messages[-1]["role"] == "document":
            return "<｜begin▁of▁sentence｜>" + item.messages[-1]["content"]
        turns = []
        for message in item.messages:
            pieces = message["content"].split("<image>")
            content: list[dict[str, str]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
            for piece in pieces[1:]:
                content += [{"type": "image"}, {"type": "text", "text": piece}]
            turns.append({"role": message["role"], "content": content})
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    def inputs(self, text: str, images: Sequence[bytes]) -> dict[str, torch.Tensor]:
        if "Assistant:" not in text:  # plain text, bos in it
            return self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        opened = [Image.open(io.BytesIO(image)) for image in images]
        return self.processor(text=text, images=opened or None, return_tensors="pt")

    def losses(self, text: str, images: Sequence[bytes] = ()) -> torch.Tensor:
        """Of every token but the first."""
        inputs = self.inputs(text, images)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1].double(), inputs["input_ids"][0, 1:], reduction="none")

    def perplexities(self, item: Any) -> list[float]:
        before = self.prompt(item)
        start = self.inputs(before, item.images)["input_ids"].shape[1]
        spaced = [option if option.startswith(" ") else f" {option}" for option in item.options]
        return [math.exp(float(self.losses(before + option, item.images)[start - 1 :].mean())) for option in spaced]

    def answer(self, item: Any, tokens: int) -> str:
        inputs = self.inputs(self.prompt(item), item.images)
        with torch.no_grad():
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        return self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


CASES = [
    ("mmlu:{0}/mmlu/test", Style()),
    ("mmlu:{0}/mmlu/test", Style(plain=True, options="letter")),
    ("hellaswag:{0}/hellaswag.jsonl", Style(plain=True)),
    ("mmbench:{0}/mmbench.tsv", Style()),
    ("mmmu:{0}/mmmu.parquet", Style(options="letter")),
]


@pytest.mark.parametrize(("name", "style"), CASES, ids=[f"{name.split(':')[0]}-{style.options}" for name, style in CASES])
@pytest.mark.parametrize("tokens_at_once", [8192, 40])
def test_choices_and_perplexities_are_those_of_a_plain_loop(
    name: str, style: Style, tokens_at_once: int, folders: Path, loop: PlainLoop, world: startup.World
) -> None:
    """Also where an item's options do not fit into one forward pass."""
    task = open_task(name.format(folders), style)
    ours = evaluator(folders, world, tokens_at_once=tokens_at_once)
    result = ours.run("task", task)
    right = 0
    for item, example in zip(task.items, result.examples, strict=True):
        theirs = loop.perplexities(item)
        assert example["perplexities"] == pytest.approx(theirs, rel=TOLERANCE)
        assert len(set(theirs)) == len(theirs)
        chosen = theirs.index(min(theirs))
        assert example["choice"] == chosen and example["answer"] == item.options[chosen].strip()
        right += chosen == item.right
    assert result.metric == "accuracy" and result.n == len(task.items) and result.score == pytest.approx(right / len(task.items))


def test_answers_are_those_of_a_plain_loop(folders: Path, loop: PlainLoop, world: startup.World) -> None:
    task = open_task(f"gsm8k:{folders}/gsm8k.jsonl")
    ours = evaluator(folders, world, max_new_tokens=12)
    result = ours.run("gsm8k", task)
    assert [example["answer"] for example in result.examples] == [loop.answer(item, 12) for item in task.items]
    assert all(len(example["answer"]) > 8 for example in result.examples)
    assert (result.metric, result.n) == ("last_number", 2)


def test_perplexity_by_group_and_bits_per_byte(folders: Path, loop: PlainLoop, world: startup.World) -> None:
    """Of the same tokens: a text is a document without its end token."""
    ours = evaluator(folders, world)
    texts = ["The quick brown fox.", "jumps over", "a lazy dog, twice"]
    items = [TaskItem([{"role": "document", "content": text}], group=group) for text, group in zip(texts, ("a", "b", "a"), strict=True)]
    result = ours.run("held out", Task("perplexity", items))
    whole = [loop.losses(f"<｜begin▁of▁sentence｜>{text}<｜end▁of▁sentence｜>") for text in texts]
    assert result.groups["a"] == (pytest.approx(float(torch.cat([whole[0], whole[2]]).mean().exp()), rel=TOLERANCE), 2)
    assert result.groups["b"] == (pytest.approx(float(whole[1].mean().exp()), rel=TOLERANCE), 1)
    assert result.score == pytest.approx(float(torch.cat(whole).mean().exp()), rel=TOLERANCE)
    nats_per_bit_bytes = math.log(2) * sum(len(text.encode()) for text in texts)
    bits = sum(float(losses[:-1].sum()) for losses in whole) / nats_per_bit_bytes
    assert ours.bits_per_byte(texts).score == pytest.approx(bits, rel=TOLERANCE)

    ours.loaded.cfg.data.seq_len = 4  # pieces of three tokens, each from the start token alone
    tokenizer = ours.loaded.processor.tokenizer
    pieces = [[tokenizer.bos_id, *ids[at : at + 3]] for ids in map(tokenizer.encode, texts) for at in range(0, len(ids), 3)]
    with torch.no_grad():
        cut = sum(float(loop.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1) for ids in pieces)
    assert ours.bits_per_byte(texts).score == pytest.approx(cut / nats_per_bit_bytes, rel=TOLERANCE)
    assert abs(cut / nats_per_bit_bytes / bits - 1) > 2 * TOLERANCE
