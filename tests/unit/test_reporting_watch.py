"""The report's samples, evaluation charts and answers: true to their files, bounded, and safe to open."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_reporting import Page, make_run, read_page, record

from dsvl_train.reporting import report
from dsvl_train.reporting.pictures import Pictures, encode, read_small
from dsvl_train.reporting.samples_file import FILE, FOLDER

HOSTILE = '<script>alert("x")</script></script><!-- "&'


def spans(*words: tuple[str, bool]) -> list[dict[str, Any]]:
    return [{"text": text, "tokens": len(text), "supervised": supervised} for text, supervised in words]


def sample(step: int, modality: str = "text", images: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "modality": modality,
        "source": "captions",
        "tokens": 12,
        "supervised_tokens": 5,
        "tiles": 0,
        "images": images or [],
        "spans": spans(("a question", False), ("an answer", True)),
        **more,
    }


def with_samples(run: Path, records: list[dict[str, Any]]) -> Path:
    (run / FOLDER).mkdir(exist_ok=True)
    (run / FOLDER / FILE).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return run


def evaluation(step: int, tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"step": step, "seconds": 1.0, "tasks": tasks, **more}


def with_evaluations(run: Path, records: list[dict[str, Any]]) -> Path:
    (run / "evaluation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return run


def answered(question: str, answer: str, score: float, **more: Any) -> dict[str, Any]:
    return {"question": question, "image": "", "answer": answer, "truth": "7", "score": score, **more}


def noise(path: Path, side: int) -> Path:
    Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side)).save(path)
    return path


def elements(path: Path, tag: str) -> list[str]:
    """The text of each element of a kind."""
    found: list[list[str]] = []

    class Elements(Page):
        def handle_starttag(self, name, attrs):
            super().handle_starttag(name, attrs)
            if name == tag:
                found.append([])

        def handle_data(self, data):
            super().handle_data(data)
            if tag in self.open:
                found[-1].append(data)

    Elements(path.read_text(encoding="utf-8"))
    return ["".join(parts) for parts in found]


# ------------------------------------------------------------------------------------------------------------- evaluations


def test_evaluation_charts_have_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    records = [record(step) for step in range(1, 41)]
    for step, digits in ((10, 0.125), (20, 0.5), (30, 0.875), (40, 0.75)):
        scores = {
            "digits": digits,
            "digits/odd": digits / 2,
            "digits/even": digits,
            "heldout/a": 30.0 / step,
            "bits_per_byte": 2.5 - step / 100,
        }
        records[step - 1] |= {f"eval/{name}": value for name, value in scores.items()} | {"eval/seconds": 2.0}
    # step 20 was run again after a resume, with other scores
    records.append(records[19] | {"eval/digits": 0.625})
    metrics = {"digits": {"metric": "exact_match"}, "heldout/a": {"metric": "perplexity"}}
    run = with_evaluations(make_run(tmp_path / "run", records), [evaluation(step, metrics) for step in (10, 20, 30, 40)])
    page = read_page(report([run], tmp_path / "r.html"))
    (digits,), (heldout,), (text,) = page.titled("Digits"), page.titled("Heldout/a"), page.titled("Held-out text")
    assert {s["name"]: (s["x"], s["y"]) for s in digits["series"]} == {
        "all": ([10, 20, 30, 40], [0.125, 0.625, 0.875, 0.75]),
        "odd": ([10, 20, 30, 40], [0.0625, 0.25, 0.4375, 0.375]),
        "even": ([10, 20, 30, 40], [0.125, 0.5, 0.875, 0.75]),
    }
    assert digits["share"] and not heldout["share"] and len(heldout["series"]) == 1
    assert heldout["series"][0]["y"] == [3.0, 1.5, 1.0, 0.75]
    assert text["series"][0]["y"] == pytest.approx([2.4, 2.3, 2.2, 2.1]) and "bits per byte, lower is better" in page.text
    assert page.series("seconds") == []


def test_a_task_of_many_groups_says_which_are_drawn(tmp_path: Path) -> None:
    scores = {"eval/mmlu": 0.5, **{f"eval/mmlu/subject {i}": i / 60 for i in range(57)}}
    run = make_run(tmp_path / "run", [record(1, **scores), record(2, **scores)])
    page = read_page(report([with_evaluations(run, [evaluation(1, {"mmlu": {"metric": "accuracy"}})])], tmp_path / "r.html"))
    assert "The first 6 of 57 groups." in page.text and len(page.titled("Mmlu")[0]["series"]) == 7


def test_answers_stand_step_by_step(tmp_path: Path) -> None:
    evaluations = []
    for step in range(10, 121, 10):
        examples = [answered("Which?", f"digit {step}.", float(step >= 60)), answered("And this?", "", 0.5)]
        evaluations.append(evaluation(step, {"digits": {"metric": "contains", "score": 0.5, "n": 2, "examples": examples}}))
    evaluations[2] = evaluation(30, {"digits": {"metric": "contains", "examples": None}})
    evaluations.append(evaluation(120, {"digits": {"metric": "contains", "examples": [answered("Which?", "run again", 1.0)]}}))
    run = with_evaluations(make_run(tmp_path / "run", [record(step) for step in range(1, 121)]), evaluations)
    path = report([run], tmp_path / "r.html")
    page = read_page(path)
    table = elements(path, "table")[1]
    assert [table.count(f"digit {step}.") for step in (10, 20, 120)] == [1, 0, 0] and table.count("run again") == 1
    heads = [words for words in elements(path, "th") if words.isdigit()]
    assert heads[:6] == ["10", "40", "60", "80", "100", "120"]
    looks = [value for tag, name, value in page.attributes if tag == "td" and name == "class"]
    assert looks.count("bad") + looks.count("good") == 6 and looks.count("part") == 5 and looks[0] == "bad" and "good" in looks


def test_held_out_samples_have_scores_and_no_answers(tmp_path: Path) -> None:
    tasks = {"heldout": {"metric": "perplexity", "score": 3.0, "examples": [answered("whole text", "", 3.0)]}}
    run = with_evaluations(make_run(tmp_path / "run", [record(1, **{"eval/heldout": 3.0})]), [evaluation(1, tasks)])
    page = read_page(report([run], tmp_path / "r.html"))
    assert page.titled("Heldout") and "whole text" not in page.text


# ----------------------------------------------------------------------------------------------------------------- samples


def test_samples_show_their_text_mask_and_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in range(1, 31)])
    text = [
        {"text": "<image>", "tokens": 421, "supervised": False, "image": 0},
        {"text": "<eos>", "tokens": 1, "supervised": True, "special": True},
    ]
    seen = sample(2, "multimodal", [{"file": "step_2.png", "tiles_wh": [2, 1], "tokens": 421}], tiles=3)
    seen["spans"] = [*text[:1], *spans(("what is it", False), ("a tile", True)), *text[1:]]
    path = report([with_samples(run, [sample(1), seen, sample(9), sample(17)])], tmp_path / "r.html")
    assert "step_2.png" in path.read_text(), "named where it cannot be read"
    noise(run / FOLDER / "step_2.png", 40)
    path = report([run], tmp_path / "r.html")
    page = read_page(path)
    assert elements(path, "mark") == ["an answer", "a tile", "<eos>", "an answer"]
    assert "<image> \u00d7421" in page.text and "12 tokens, 5 supervised, 3 tiles" in page.text
    assert elements(path, "h4") == ["Step 1, text", "Step 2, multimodal", "Step 17, text"]
    assert "samples/ holds those of 4 steps" in page.text
    assert sum(tag == "img" and name == "src" and value.startswith("data:image/png;base64,") for tag, name, value in page.attributes) == 1


def test_long_texts_are_cut_where_they_say_least(tmp_path: Path) -> None:
    long = sample(1)
    long["spans"] = spans(("begin" + "." * 9000 + "end", False), ("the answer", True), *[("filler " * 100, bool(i % 2)) for i in range(40)])
    path = report([with_samples(make_run(tmp_path / "run", [record(1)]), [long])], tmp_path / "r.html")
    words = read_page(path).text
    drawn = words.count("filler") // 100
    assert "begin..." in words and "...end" in words and elements(path, "mark")[0] == "the answer"
    assert 5000 < len("".join(elements(path, "p"))) < 9000
    (left_out,) = [words for words in elements(path, "span") if words.endswith(" more")]
    assert left_out == f"… {700 * (40 - drawn):,} tokens more" and 0 < drawn < 10


def test_a_run_without_any_of_it_has_no_empty_part(tmp_path: Path) -> None:
    path = report([make_run(tmp_path / "run", [record(1), record(2)])], tmp_path / "r.html")
    assert "Samples" not in elements(path, "h3") and "Evaluation" not in elements(path, "h3")


# --------------------------------------------------------------------------------------------------------- bounds and safety


def test_a_page_stays_of_a_size_that_one_can_send(tmp_path: Path) -> None:
    runs = []
    for stage in ("align", "pretrain", "sft"):
        run = make_run(tmp_path / stage, [record(1), record(2, "multimodal")], stage)
        (run / FOLDER).mkdir()
        names = [noise(run / FOLDER / f"{number}.png", 560 + number).name for number in range(8)]
        images = [{"file": name, "tiles_wh": [3, 3], "tokens": 9} for name in names]
        runs.append(with_samples(run, [sample(2, "multimodal", images[i : i + 2]) for i in range(0, 8, 2)]))
    path = report(runs, tmp_path / "r.html")
    assert 2_000_000 < path.stat().st_size < 3_000_000
    page = read_page(path)
    assert page.text.count("left out to keep the page small") >= 3
    shown = sum(tag == "img" and name == "src" for tag, name, _ in page.attributes)
    assert shown >= 3 and shown + page.text.count("left out to keep") == 24


def test_hostile_text_stays_text_and_names_stay_in_their_folder(tmp_path: Path) -> None:
    secret = noise(tmp_path / "secret.png", 30)
    hostile = sample(1, "text", [{"file": name, "tokens": HOSTILE} for name in ("../../secret.png", str(secret), HOSTILE, "..", "")])
    hostile |= {
        "source": HOSTILE,
        "spans": [{"text": HOSTILE, "tokens": 1, "supervised": place % 2, "special": place > 1} for place in range(4)],
    }
    hostile["spans"].append({"text": HOSTILE, "tokens": HOSTILE, "supervised": False, "image": 0})
    tasks = {HOSTILE: {"metric": HOSTILE, "examples": [answered(HOSTILE, HOSTILE, 0.5, truth=HOSTILE, image=HOSTILE), "no example"]}}
    run = make_run(tmp_path / "run", [record(1, **{f"eval/{HOSTILE}": 0.5, f"eval/{HOSTILE}/{HOSTILE}": 0.5})])
    path = report([with_evaluations(with_samples(run, [hostile]), [evaluation(1, tasks)])], tmp_path / "r.html")
    raw = path.read_text(encoding="utf-8")
    assert raw.count("<script") == 2 and "<!--" not in raw and "<img" not in raw
    page = read_page(path)
    assert page.text.count('<script>alert("x")</script>') >= 10
    assert any(name == "content" and value.startswith("default-src 'none'") for _, name, value in page.attributes)


def test_small_pictures_keep_their_pixels_and_large_ones_their_shape(tmp_path: Path) -> None:
    path = noise(tmp_path / "small.png", 60)
    picture, longest = read_small(path, 100)
    content, kind = encode(picture)
    assert (longest, kind) == (60, "PNG") and Image.open(io.BytesIO(content)).tobytes() == Image.open(path).tobytes()
    Image.new("RGB", (2000, 500)).save(tmp_path / "large.jpg")
    picture, longest = read_small(tmp_path / "large.jpg", 400)
    assert picture.size == (400, 100) and longest == 2000 and encode(noise_image(400))[1] == "JPEG"
    pictures = Pictures(budget=10)
    assert "small.png, left out" in pictures.embed([path], 100, "a tile").html and pictures.spent == 0


def noise_image(side: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(1).randbytes(3 * side * side))
