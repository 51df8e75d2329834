"""The report: what it reads, what it draws, and that it stands alone."""

from __future__ import annotations

import json
import logging
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsvl_train.reporting import parse_evaluations, report
from dsvl_train.reporting.charts import POINT_LIMIT, Chart, Figures, Series
from dsvl_train.reporting.metrics import read_metrics, smooth, thin
from dsvl_train.reporting.scale import Axis, compact, tick_labels, value_axis
from dsvl_train.reporting.stage_section import relative_load

VOID = {"meta", "img", "path", "rect", "br", "link"}


class Page(HTMLParser):
    """Collects what tests ask about; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.figures: dict = {}
        self._figures_next = False
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._figures_next = ("id", "figures") in attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self._figures_next:
            self.figures, self._figures_next = json.loads(data), False
        elif not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def titled(self, title: str) -> list[dict]:
        return [figure for figure in self.figures.values() if figure["title"] == title]

    def series(self, name: str) -> list[dict]:
        return [s for figure in self.figures.values() for s in figure["series"] if s["name"] == name]


def record(step: int, modality: str = "text", **more) -> dict:
    return {
        "step": step,
        "modality": modality,
        "loss": 3.0 / step + 1e-4 * math.pi,
        "grad_norm": 1.0 + 1.0 / step,
        "lr": {"vision": 1e-4 / step, "language": 1e-3 / step},
        "tokens": 100,
        "supervised_tokens": 60,
        "tiles": 0 if modality == "text" else 6,
        "text_share": 0.5,
        "text_share_target": 0.5,
        "step_s": 0.5,
        "data_wait_s": 0.05,
        "tokens_per_s": 200.0,
        "expert_load": [[0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]],
        "bad_samples": 0,
        **more,
    }


def make_run(folder: Path, records: list[dict], stage: str = "pretrain", **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = {
        "run": {"name": stage, "max_steps": len(records)},
        "model": {"name": "tiny", "language": {"moe": {"dense_layers": 1}}},
        "stage": {"name": stage, "policy": [{"pattern": "vision.*", "lr_multiplier": None}, {"pattern": "*", "lr_multiplier": 0.1}]},
        "optim": {"lr": 1e-3, "clip_grad": 1.0, "schedule": {"kind": "cosine", "warmup_steps": 3}},
        **settings,
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def alternating(steps: int) -> list[dict]:
    return [record(step, "text" if step % 2 else "multimodal") for step in range(1, steps + 1)]


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ reading metrics


def test_the_last_object_of_a_step_counts_and_steps_come_sorted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 3}\n\n{"step": 2, "loss": 20}\n{"step": 10}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 20}, {"step": 3, "loss": 3}, {"step": 10}]


def test_a_torn_last_line_is_passed_over_silently(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "source": "\xc3')
    with caplog.at_level(logging.WARNING):
        assert read_metrics(path) == [{"step": 1}]
    assert caplog.records == []


def test_a_torn_line_that_a_resumed_run_wrote_after_is_passed_over_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 2, "loss": 1.0}\n')
    with caplog.at_level(logging.WARNING):
        assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]
    assert "line 2 is torn" in caplog.text


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": 0}', '{"step": 1.5}', '{"step": true}', "[1]"])
def test_a_line_without_a_step_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: step is"):
        read_metrics(path)


def test_an_empty_file_has_no_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert read_metrics(path) == []


# --------------------------------------------------------------------------------------------------------- curves and numbers


def test_smoothing_is_centred_and_skips_what_is_missing():
    assert smooth([1, 2, 3, 4], [1.0, 2.0, None, 6.0], 3) == ([1, 2, 3, 4], [1.5, 1.5, 4.0, 6.0])
    assert smooth([1, 2, 3], [1.0, 100.0, 3.0], 3, median)[1] == [50.5, 3.0, 51.5]
    assert smooth([], [], 3) == ([], [])
    xs, ys = smooth(list(range(9000)), [2.0] * 9000, 99)
    assert xs[0] == 0 and xs[-1] == 8999 and len(xs) < 3000 and set(ys) == {2.0}


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=300), st.integers(4, 50))
def test_thinning_keeps_the_extremes_and_drops_nothing_of_a_short_curve(ys, limit):
    xs = [float(i) for i in range(len(ys))]
    thin_xs, thin_ys = thin(xs, ys, limit)
    there = [y for y in ys if y is not None]
    if len(ys) <= limit:
        assert (thin_xs, thin_ys) == (xs, ys)
    else:
        assert len(thin_xs) <= limit + 1 and thin_xs == sorted(thin_xs)
        assert all(ys[int(x)] == y for x, y in zip(thin_xs, thin_ys, strict=True))
        if there:
            assert {min(there), max(there)} <= set(thin_ys)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0123, "0.0123"), (3.456, "3.46"), (120, "120"), (100, "100"), (1234, "1,234"), (12345, "12.3k"), (3.4e6, "3.4M"),
        (7.98e11, "798G"), (5.4e-4, "5.4e-4"), (1e-5, "1e-5"), (-2.5, "-2.5"), (999.6, "1,000"), (999_600, "1M"),
    ],
)  # fmt: skip
def test_compact_numbers(value, text):
    assert compact(value) == text


def test_ticks_are_round_and_inside():
    assert Axis(0.0, 1.0).ticks(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis(1, 400).ticks(5) == [100, 200, 300, 400]
    assert Axis(0.3, 40, log=True).ticks(6) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert tick_labels([0.0, 5e-4, 1e-3]) == ["0", "5e-4", "1e-3"]
    assert tick_labels([1.025, 1.05, 1.075]) == ["1.025", "1.05", "1.075"]


@given(st.floats(-1e7, 1e7), st.floats(1e-6, 1e7))
def test_tick_labels_say_what_the_ticks_are(low, size):
    axis = Axis(low, low + size)
    if axis.high > axis.low and size > 1e-4 * abs(low):
        ticks = axis.ticks(6)
        labels = tick_labels(ticks)
        units = {"k": 1e3, "M": 1e6, "G": 1e9}
        read = [float(label.rstrip("kMG").replace(",", "")) * units.get(label[-1], 1.0) for label in labels]
        assert 2 <= len(ticks) <= 8 and read == pytest.approx(ticks, rel=1e-6, abs=1e-12)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.booleans())
def test_a_value_axis_holds_its_values(values, zero):
    axis = value_axis(values, zero=zero)
    assert axis.low < axis.high or not math.isfinite(axis.high - axis.low)
    assert all(0.0 <= axis.position(value) <= 1.0 for value in values)
    assert axis.low <= min(values) and max(values) <= axis.high


# -------------------------------------------------------------------------------------------------------------------- charts


def test_outliers_beyond_a_robust_axis_are_counted_in_the_note():
    ys = [30.0] + [1.0] * 99
    html = Figures().draw(Chart("Step time", "seconds", [Series("step", list(range(1, 101)), ys, "c1", "dots")], zero=True, robust=True))
    assert "1 step lies beyond the axis, up to 30." in html


def test_a_long_curve_is_thinned_and_says_so():
    figures, n = Figures(), 3 * POINT_LIMIT
    html = figures.draw(Chart("Loss", "nats", [Series("text", list(range(1, n + 1)), [float(i % 7) for i in range(n)], "text", "dots")]))
    assert "the lowest and highest of neighbouring steps" in html and html.count("h0") <= POINT_LIMIT + 2


def test_a_chart_without_values_is_not_drawn():
    figures = Figures()
    assert figures.draw(Chart("Loss", "nats", [Series("text", [1.0], [None], "text")])) == "" and figures.payload == {}


def test_relative_load_is_over_the_mean_whatever_the_unit():
    assert relative_load({"expert_load": [[0.1, 0.3], [30, 10]]}) == [pytest.approx([0.5, 1.5]), [1.5, 0.5]]
    assert relative_load({}) == relative_load({"expert_load": None}) == []


# ---------------------------------------------------------------------------------------------------------------- whole pages


def test_every_step_of_every_stage_is_in_the_page_with_its_value(tmp_path):
    stages = {"lm": [record(step) for step in range(1, 31)], "pretrain": alternating(60)}
    runs = [make_run(tmp_path / name, records, name) for name, records in stages.items()]
    page = read_page(report(runs, tmp_path / "out" / "report.html"))
    loss_figures = page.titled("Loss")
    assert len(loss_figures) == 2
    for figure, records in zip(loss_figures, stages.values(), strict=True):
        for modality in {r["modality"] for r in records}:
            (series,) = [s for s in figure["series"] if s["name"] == modality]
            wanted = [r for r in records if r["modality"] == modality]
            assert series["x"] == [r["step"] for r in wanted]
            assert series["y"] == pytest.approx([r["loss"] for r in wanted], rel=1e-6)
    assert [len(s["x"]) for s in page.series("vision")] == [30, 60]
    assert [f["series"][0]["x"] for f in page.titled("Step time")] == [list(range(1, 31)), list(range(1, 61))]
    assert page.text.count("Language model") >= 2 and "vision frozen, all else \u00d70.1" in page.text


def test_repeated_steps_count_once(tmp_path):
    run = make_run(tmp_path / "run", [*alternating(20), *[record(step, "text", loss=9.0) for step in (19, 20)]])
    page = read_page(report([run], tmp_path / "report.html"))
    assert "20 steps" in page.text
    (figure,) = page.titled("Loss")
    points = {x: y for s in figure["series"] if s["name"] in ("text", "multimodal") for x, y in zip(s["x"], s["y"], strict=True)}
    assert len(points) == 20 and points[18] != 9.0 and points[19] == points[20] == 9.0


def test_the_page_needs_nothing_from_outside(tmp_path):
    image = tmp_path / "seven.png"
    Image.new("L", (8, 8), 128).save(image)
    evaluation = tmp_path / "evaluation.json"
    example = {"task": "digits", "image": "seven.png", "question": "See https://example.org", "answer": "7", "truth": "7", "score": 1.0}
    evaluation.write_text(json.dumps({"model": "m", "tasks": {}, "examples": [example]}))
    path = report([make_run(tmp_path / "run", alternating(30))], tmp_path / "report.html", evaluation)
    page = read_page(path)
    links = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data", "poster")]
    assert links and all(value.startswith(("#", "data:image/png;base64,")) for _, _, value in links)
    assert not {tag for tag, _, _ in page.attributes} & {"link", "iframe", "object", "embed", "base"}
    style = re.search("<style>(.*?)</style>", path.read_text(), re.S)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert any(name == "content" and value.startswith("default-src 'none'") for _, name, value in page.attributes)


def test_hostile_text_stays_text(tmp_path):
    hostile = '<script>alert("x")</script></script><!-- "&'
    run = make_run(
        tmp_path / "run",
        [record(s, "multimodal", loss_by_source={hostile: 1.0, "other": 2.0}, lr={hostile: 0.1}) for s in range(1, 20)],
        stage=hostile,
        model={"name": hostile},
    )
    evaluation = tmp_path / "evaluation.json"
    example = {"task": hostile, "image": hostile, "question": hostile, "answer": hostile + "a", "truth": hostile, "score": 0.9}
    evaluation.write_text(json.dumps({"tasks": {hostile: {"metric": hostile, "score": 0.5, "n": 3}}, "examples": [example]}))
    path = report([run], tmp_path / "report.html", evaluation)
    page, raw = read_page(path), path.read_text()
    assert raw.count("<script") == 2 and "<!--" not in raw
    assert page.text.count('<script>alert("x")</script></script><!-- "&') >= 5
    assert len(page.series(hostile)) == 2  # learning rate and loss by source


def test_scores_examples_and_bits_per_byte_of_each_stage(tmp_path):
    Image.new("RGB", (1800, 600), "white").save(tmp_path / "page.png")
    runs = [make_run(tmp_path / stage, alternating(14), stage) for stage in ("lm", "sft")]
    files = {
        "lm": {"bits_per_byte": 2.0},
        "sft": {"bits_per_byte": 2.1, "tasks": {"digits": {"metric": "exact_match", "score": 0.973, "n": 300}}},
    }
    files["sft"]["examples"] = [
        {"task": "digits", "image": "page.png", "question": "Which?", "answer": "7", "truth": "7", "score": 1.0},
        {"task": "digits", "image": "gone.png", "question": "Which?", "answer": "1", "truth": "9", "score": 0.0},
        {
            "task": "pages",
            "image": str(tmp_path / "page.png"),
            "question": "Read",
            "answer": "a clam sea",
            "truth": "a calm sea",
            "score": 0.8,
        },
    ]
    for stage, content in files.items():
        (tmp_path / f"{stage}.json").write_text(json.dumps(content))
    path = report(runs, tmp_path / "report.html", {stage: tmp_path / f"{stage}.json" for stage in files}, title="Demo")
    page = read_page(path)
    assert "97.3%" in page.text and "n = 300" in page.text and "2.100 +5.0%" in page.text and "+5.0% since language model" in page.text
    classes = [value for tag, name, value in page.attributes if name == "class" and value.startswith("example ")]
    assert classes == ["example good", "example bad", "example part"]
    assert "cannot read gone.png" in page.text and "truth 9" in page.text and "1 of 2 examples fully right" in page.text
    assert "(80%)" in page.text and path.stat().st_size < 300_000  # the large image was scaled down


def test_an_evaluation_as_one_file_belongs_to_the_last_stage(tmp_path):
    (tmp_path / "e.json").write_text('{"tasks": {"digits": {"metric": "exact_match", "score": 0.5, "n": 2}}}')
    runs = [make_run(tmp_path / stage, alternating(2), stage) for stage in ("lm", "sft")]
    assert "scored after supervised fine-tuning" in read_page(report(runs, tmp_path / "r.html", tmp_path / "e.json")).text


def test_two_runs_of_one_stage_are_told_apart_by_their_folders(tmp_path):
    page = read_page(report([make_run(tmp_path / name, alternating(3)) for name in ("first", "second")], tmp_path / "r.html"))
    assert "Joint pretraining (first)" in page.text and "Joint pretraining (second)" in page.text


def test_the_text_share_chart_states_the_largest_distance_from_the_target(tmp_path):
    records = alternating(8)
    for r in records:
        r["text_share"] = math.ceil(r["step"] / 2) / r["step"]
    page = read_page(report([make_run(tmp_path / "run", records)], tmp_path / "r.html"))
    assert "Never further than 0.50 steps from the target." in page.text
    assert [len(s["x"]) for s in page.series("realised") + page.series("target")] == [8, 8]


def test_expert_loads_tiles_and_bad_samples_are_shown_with_their_numbers(tmp_path):
    records = alternating(20)
    records[1]["tiles_per_image"], records[3]["tiles_per_image"] = {"1": 12, "3": 2}, {"1": 1}
    for r in records[4:]:
        r["bad_samples"] = 2
    page = read_page(report([make_run(tmp_path / "run", records)], tmp_path / "r.html"))
    titles = [value for tag, name, value in page.attributes if tag == "td" and name == "title"]
    assert titles[:3] == ["layer 1, expert 0: 0.750", "layer 1, expert 1: 0.750", "layer 1, expert 2: 1.500"] and len(titles) == 6
    assert "15 images in the run, 1.27 local tiles each on average;" in page.text
    (bad,) = page.series("bad samples")
    assert bad["y"] == [0, 0, 0, 0] + [2] * 16
    (worst,) = page.series("worst layer")
    assert worst["y"] == pytest.approx([0.5] * 20)


def test_steps_without_a_finite_loss_are_counted(tmp_path):
    records = alternating(20)
    records[6]["loss"] = None
    page = read_page(report([make_run(tmp_path / "run", records)], tmp_path / "r.html"))
    assert "1 step without a finite loss." in page.text


def test_learning_rate_groups_may_come_and_go(tmp_path):
    records = alternating(10)
    for r in records:
        r["lr"] = {"x1": 1e-3} if r["modality"] == "text" else {"x1": 1e-3, "x0.1": 1e-4}
    page = read_page(report([make_run(tmp_path / "run", records)], tmp_path / "r.html"))
    assert [s["x"] for s in page.series("\u00d70.1")] == [[2, 4, 6, 8, 10]] and len(page.series("\u00d71")[0]["x"]) == 10


def test_time_and_data_wait_of_the_summary(tmp_path):
    page = read_page(report([make_run(tmp_path / "run", alternating(40))], tmp_path / "r.html"))
    assert "took 9.1% of the run" in page.text and "22 s" in page.text  # 40 steps of 0.5 s and 0.05 s of waiting


def test_the_barest_run_and_a_run_without_steps_still_make_a_page(tmp_path):
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "modality": "text", "loss": 2.0}\n')
    make_run(empty, [], "sft")
    page = read_page(report([bare, empty], tmp_path / "r.html"))
    assert "bare" in page.text and "No step was recorded" in page.text


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        report([], tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        report([tmp_path / "nowhere"], tmp_path / "r.html")
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        report([make_run(tmp_path / "run", alternating(2))], tmp_path / "r.html", tmp_path / "e.json")


def test_eval_arguments():
    assert parse_evaluations(["lm=a.json", "sft=b=c.json"]) == {"lm": Path("a.json"), "sft": Path("b=c.json")}
    with pytest.raises(ValueError, match="give STAGE=FILE"):
        parse_evaluations(["a.json"])
