"""Readers of benchmark files, on small made samples: what is asked, which answer is right, and what wrong files are told."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from dsvl_train.data.shards import ShardWriter
from dsvl_train.evaluation.layouts import open_task
from dsvl_train.evaluation.prompts import Style
from dsvl_train.evaluation.tasks import read_task
from tests.made_benchmarks import png, write_gsm8k, write_hellaswag, write_mmbench, write_mmlu, write_mmmu

ASKED = '{"messages": [{"role": "user", "content": "a"}], '
PLAIN, LETTER = Style(plain=True), Style(options="letter")


def asked(item) -> str:
    return item.messages[-1]["content"]


def test_mmlu(tmp_path: Path) -> None:
    task = open_task(f"mmlu:{write_mmlu(tmp_path)}/test")
    assert task.metric == "accuracy" and not task.has_images
    assert [(item.group, item.right) for item in task.items] == [("abstract_algebra", 1), ("abstract_algebra", 2), ("anatomy", 0)]
    assert task.items[1].messages == [{"role": "user", "content": 'test A "ring", has'}]
    assert list(task.items[1].options) == ["one", "two", "x, y", "no"]


def test_mmlu_as_plain_text_with_letters_and_worked_examples(tmp_path: Path) -> None:
    folder = write_mmlu(tmp_path)
    style = Style(plain=True, options="letter")
    task = open_task(f"mmlu:{folder}/test", style, shots=1, shots_from=f"{folder}/dev")
    assert task.items[2].messages == [
        {
            "role": "document",
            "content": "The following are multiple choice questions (with answers) about anatomy.\n\n"
            "Question: dev Which is a bone?\nThink.\nA. the femur\nB. the liver\nC. the skin\nD. the eye\nAnswer: A\n\n"
            "Question: test Which is a bone?\nThink.\nA. the femur\nB. the liver\nC. the skin\nD. the eye\nAnswer:",
        }
    ]
    assert list(task.items[2].options) == [" A", " B", " C", " D"]
    turns = open_task(f"mmlu:{folder}/test", shots=3, shots_from=f"{folder}/dev").items[0].messages
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3 + ["user"]
    assert [turn["content"] for turn in turns[1:5:2]] == ["4", "x, y"]
    with pytest.raises(ValueError, match="4 worked examples are wanted, and there are 3"):
        open_task(f"mmlu:{folder}/test", shots=4, shots_from=f"{folder}/dev/anatomy_dev.csv")


def test_hellaswag_goes_on_with_the_text(tmp_path: Path) -> None:
    path = write_hellaswag(tmp_path / "val.jsonl")
    first, second = open_task(f"hellaswag:{path}", PLAIN).items
    assert first.messages == [{"role": "document", "content": "Removing ice: A man sits on a roof. He"}]
    assert list(first.options)[2:] == [" holds a cube of ice.", " pulls up roofing."] and first.right == 3
    assert asked(second) == "How to cook rice. Wash it" and second.right == 0
    assert open_task(f"hellaswag:{path}").items[1].messages == [{"role": "user", "content": "How to cook rice. Wash it"}]


def test_gsm8k_is_judged_by_its_number(tmp_path: Path) -> None:
    path = write_gsm8k(tmp_path / "test.jsonl")
    task = open_task(f"gsm8k:{path}", PLAIN, shots=1, shots_from=str(path))
    assert task.metric == "last_number" and [list(item.truths) for item in task.items] == [["7"], ["1,200"]]
    assert asked(task.items[1]).startswith("Question: Ann has") and asked(task.items[1]).endswith("200 more.\nAnswer:")
    assert "#### 7\n\nQuestion: A car" in asked(task.items[1]) and task.items[1].stop == "\n\nQuestion:"


def test_mmbench(tmp_path: Path) -> None:
    first, second, third = open_task(f"mmbench:{write_mmbench(tmp_path / 'dev.tsv')}").items
    assert asked(first) == "<image>\nLook\tclosely.\nWhat is on the picture?" and first.right == 3 and first.group == "scenes"
    assert list(second.options) == ["yes", "no"]
    assert list(first.images) == list(third.images) == [png(0)] and list(second.images) == [png(1, (300, 220))]
    lettered = open_task(f"mmbench:{tmp_path / 'dev.tsv'}", LETTER).items[1]
    assert asked(lettered) == "<image>\nIs it noisy?\nA. yes\nB. no\nAnswer with the letter of the right option."
    assert list(lettered.options) == ["A", "B"]


def test_mmmu(tmp_path: Path) -> None:
    one, two, pictured = open_task(f"mmmu:{write_mmmu(tmp_path / 'validation.parquet')}").items
    assert asked(one) == "<image> Which sum is it?" and list(one.options) == ["$6", "Ann's $7", "$8"] and one.right == 1
    assert list(two.images) == [png(5), png(4)] and two.group == "Accounting"
    assert asked(pictured) == "Which one is noise?\nA. <image>\nB. <image>\nAnswer with the letter of the right option."
    assert list(pictured.options) == ["A", "B"] and len(pictured.images) == 2 and pictured.group == "Art_Theory"


def test_mmmu_names_the_extra_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mmmu(tmp_path / "validation.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install -e .\[eval\]"):
        open_task(f"mmmu:{path}")


def test_held_out_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards", max_samples=1) as writer:
        for answer in ("one", "two"):
            user = {"role": "user", "content": "<image>\nwhat is this"}
            writer.write([user, {"role": "assistant", "content": answer}], [("png", png(0))])
    task = open_task(f"shards:{tmp_path}/shards")
    assert task.metric == "perplexity" and [asked(item) for item in task.items] == ["one", "two"]
    assert all(list(item.images) == [png(0)] for item in task.items)


def test_a_task_file_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    user, answer = {"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "a cat"}

    def read(**record):
        (tmp_path / "task.jsonl").write_text(json.dumps({"messages": [user], "images": ["a.png"]} | record))
        task = read_task(tmp_path / "task.jsonl")
        return task.metric, task.items[0]

    for right in (1, "a dog"):
        metric, item = read(options=["a cat", "a dog"], answer=right, group="pets")
        assert (metric, item.right, item.group) == ("accuracy", 1, "pets") and item.images == [tmp_path / "a.png"]
    metric, item = read(answer=["cat", "tom cat"], metric="anls", messages=[user, {"role": "assistant", "content": ""}])
    assert (metric, item.truths, item.messages) == ("anls", ["cat", "tom cat"], [user])
    assert read(answer="7")[0] == "exact_match"
    metric, item = read(messages=[user, answer])
    assert metric == "perplexity" and item.messages == [user, answer]


def mmbench_with(tmp_path: Path, **changes: str) -> str:
    header, first, *_ = write_mmbench(tmp_path / "dev.tsv").read_bytes().decode().split("\r\n")
    names, row = header.split("\t"), next(csv.reader([first], delimiter="\t"))
    with (tmp_path / "dev.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([names, [changes.get(name, value) for name, value in zip(names, row, strict=True)]])
    return f"mmbench:{tmp_path}/dev.tsv"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda tmp: mmbench_with(tmp, image="no base64!"), "line 2: the image is neither base64"),
        (lambda tmp: mmbench_with(tmp, answer="E"), "line 2: the answer must be a letter from A to D, of 4 options, found 'E'"),
        (lambda tmp: write(tmp, "mmbench:", 'index\tquestion\n"1\t2'), "lacks A, B, answer, image"),
        (lambda tmp: write(tmp, "mmlu:", "one,two\n"), "line 1 has 2 columns"),
        (lambda tmp: write(tmp, "mmlu:", '"never closed\n'), "unexpected end of data"),
        (lambda tmp: write(tmp, "hellaswag:", '{"ctx": "a", "endings": ["b", "c"], "label": 2}'), "sample 0 is not of HellaSwag"),
        (lambda tmp: write(tmp, "gsm8k:", '{"question": "a", "answer": "7"}'), "after ####"),
        (lambda tmp: write(tmp, "mmmu:", "PAR1 it is not"), "row 0: not parquet"),
        (lambda tmp: write(tmp, "", '{"messages": [{"role": "user", "content": "a"}]}'), "sample 0 has neither `answer` nor `options`"),
        (lambda tmp: write(tmp, "", ASKED + '"options": ["b", " "], "answer": 0}'), "none of them blank"),
        (lambda tmp: write(tmp, "", ASKED + '"options": ["b", "c"], "answer": 2}'), "from 0 to 1"),
        (lambda tmp: write(tmp, "", ASKED + '"answer": "b", "metric": "bleu"}'), "choose from"),
        (lambda tmp: write(tmp, "", ASKED + '"answer": "b"}\n' + ASKED + '"options": ["b", "c"], "answer": 0}'), "sample 1 is judged by"),
        (lambda tmp: f"mmlu:{tmp}/nowhere", "neither a file nor a folder"),
    ],
)  # fmt: skip
def test_wrong_files_are_told_what_and_where(make, words: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_task(make(tmp_path))


def write(folder: Path, layout: str, text: str) -> str:
    (folder / "file").write_text(text)
    return f"{layout}{folder}/file"
