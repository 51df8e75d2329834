"""What samples are made of, divided once into a training and a held-out part that never mix.

Every division is a function of the material itself (a hash), not of the seed: digits by scan, words by spelling, texts by topic or
module, charts by the column that they show.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from sklearn import datasets

from data_recipes.demo.texts import Document, Entry, collect_documents, collect_entries, first_sentence, split_documents

DIGITS_HELD_OUT_PER_CLASS = 30
HELD_OUT_WORD_SHARE = 0.13
HELD_OUT_CHART_SHARE = 0.15
MAX_ANSWER_CHARS = 140
_ABBREVIATIONS = {
    "fractal dimension": "fractal dim",
    "concave points": "concave pts",
    "nonflavanoid phenols": "nonflav. phenols",
    "od280/od315 of diluted wines": "od280/od315",
    "alcalinity of ash": "ash alcalinity",
}
_WORD = re.compile(r"(?<![\w.'\"/-])[a-z]{3,8}(?![\w'\"(/-]|\.\w)")


@dataclass(frozen=True)
class Digit:
    scan: np.ndarray
    """[8, 8], ink 0 to 16."""
    label: int


@dataclass(frozen=True)
class Chart:
    """The means of one column of a table, per group of its rows."""

    table: str
    title: str
    """The column, as drawn above the bars."""
    grouping: str
    """What divides the rows, in words."""
    values: tuple[str, ...]
    """Means, rounded, as drawn above the bars."""
    heights: tuple[float, ...]
    """Bars, 0 to 1; the axis does not start at zero."""

    @property
    def highest(self) -> str:
        return chr(ord("A") + int(np.argmax(self.heights)))

    @property
    def lowest(self) -> str:
        return chr(ord("A") + int(np.argmin(self.heights)))


@dataclass(frozen=True)
class Materials:
    """One side, training or held-out."""

    digits: list[Digit]
    words: list[str]
    """Words to render alone."""
    passages: list[list[str]]
    """Words of running text, lower case, to render as pages."""
    charts: list[Chart]
    entries: list[Entry]
    """Documented names."""
    documents: list[Document]
    """The text corpus."""


def load_materials() -> tuple[Materials, Materials]:
    """Training and held-out materials: scikit-learn's bundled data and the texts of this Python."""
    entries = collect_entries()
    documents, held_documents = split_documents(collect_documents(entries))
    held_groups = {d.group for d in held_documents}
    held_text = _letters(" ".join(d.text for d in held_documents))
    digits, held_digits = _split_digits()
    charts = _all_charts()
    counts = _word_counts(documents)
    known = [w for w in sorted(counts) if counts[w] >= 2]
    held_counts = _word_counts(held_documents)
    train = Materials(
        digits=digits,
        words=[w for w in known if not is_held_out_word(w)],
        passages=_passages(documents, want_held_out=False),
        charts=[c for c in charts if not _is_held_out_chart(c)],
        entries=[e for e in entries if e.group not in held_groups and _is_answerable(e) and not _is_quoted(e, held_text)],
        documents=documents,
    )
    held = Materials(
        digits=held_digits,
        words=[w for w in sorted(held_counts) if is_held_out_word(w) and counts[w] >= 2],
        passages=_passages(held_documents, want_held_out=True),
        charts=[c for c in charts if _is_held_out_chart(c)],
        entries=[e for e in entries if e.group in held_groups and _is_answerable(e)],
        documents=held_documents,
    )
    return train, held


def hash_share(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def is_held_out_word(word: str) -> bool:
    """Whether a word is kept for the evaluation: no training image shows it."""
    return hash_share(f"word:{word}") < HELD_OUT_WORD_SHARE


def _is_held_out_chart(chart: Chart) -> bool:
    return hash_share(f"chart:{chart.table}:{chart.title}") < HELD_OUT_CHART_SHARE


def _is_answerable(entry: Entry) -> bool:
    """Whether the docstring begins with a sentence that says what a public name does."""
    sentence = first_sentence(entry.text)
    return (
        12 <= len(sentence) <= MAX_ANSWER_CHARS
        and len(entry.name) <= 40
        and "._" not in entry.name
        and not entry.name.startswith("_")
        and sentence[0].isupper()
        and sentence.endswith(".")
        and ">>>" not in sentence
    )


def _is_quoted(entry: Entry, held_text: str) -> bool:
    """Whether a held-out text happens to say the same sentence; short ones ("Return repr(self).") are common property."""
    sentence = _letters(first_sentence(entry.text))
    return len(sentence) >= 40 and sentence in held_text


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text).lower()


def _split_digits() -> tuple[list[Digit], list[Digit]]:
    """Per class, the scans with the lowest hashes are held out; a scan that occurs twice stays on one side."""
    bunch = datasets.load_digits()
    by_class: dict[int, dict[str, list[Digit]]] = {}
    for scan, label in zip(bunch.images, bunch.target, strict=True):
        key = hashlib.sha256(scan.astype(np.uint8).tobytes()).hexdigest()
        by_class.setdefault(int(label), {}).setdefault(key, []).append(Digit(scan, int(label)))
    train: list[Digit] = []
    held: list[Digit] = []
    for label in sorted(by_class):
        ordered = [by_class[label][key] for key in sorted(by_class[label])]
        held += [same[0] for same in ordered[:DIGITS_HELD_OUT_PER_CLASS]]
        train += [d for same in ordered[DIGITS_HELD_OUT_PER_CLASS:] for d in same]
    return train, held


def _word_counts(documents: Iterable[Document]) -> Counter[str]:
    return Counter(word for d in documents for word in _WORD.findall(d.text))


def _passages(documents: Iterable[Document], *, want_held_out: bool) -> list[list[str]]:
    """Runs of words of the prose paragraphs, enough for a page. Training runs hold no held-out word; held-out runs begin with one."""
    passages = []
    for d in documents:
        for paragraph in d.text.split("\n\n"):
            words = re.findall(r"[a-z]+", paragraph.lower())
            if len(words) < 6 or len(words) * 8 < len(paragraph):
                continue
            starts = [i for i, w in enumerate(words) if is_held_out_word(w) and len(w) >= 3] if want_held_out else range(0, len(words), 6)
            for start in starts:
                run = words[start : start + 14]
                if len(run) >= 6 and max(map(len, run)) <= 10 and (want_held_out or not any(map(is_held_out_word, run))):
                    passages.append(run)
    return passages


def _all_charts() -> list[Chart]:
    charts = []
    tables = {
        "wine": datasets.load_wine(),
        "iris": datasets.load_iris(),
        "breast cancer": datasets.load_breast_cancer(),
        "diabetes": datasets.load_diabetes(scaled=False),
    }
    for table, bunch in tables.items():
        names = [_short_title(str(name)) for name in bunch.feature_names]
        for column, title in enumerate(names):
            for grouping, group_of_row in _groupings(bunch, names, table, column):
                chart = _chart(table, title, grouping, bunch.data[:, column], group_of_row)
                if chart:
                    charts.append(chart)
    return charts


def _groupings(bunch: datasets.base.Bunch, names: list[str], table: str, column: int) -> Iterable[tuple[str, np.ndarray]]:
    """Ways to divide the rows: by class, and by equal parts of another column."""
    if table != "diabetes":
        yield f"class of {table}", bunch.target
    for other, name in enumerate(names):
        values = bunch.data[:, other]
        if other == column or len(np.unique(values)) < 8:
            continue
        for parts in (2, 3, 4):
            edges = np.quantile(values, np.linspace(0, 1, parts + 1)[1:-1])
            yield f"{('half', 'third', 'quarter')[parts - 2]} by {name}", np.searchsorted(edges, values)


def _chart(table: str, title: str, grouping: str, column: np.ndarray, group_of_row: np.ndarray) -> Chart | None:
    """None where the bars would not tell which is the highest and the lowest, or the numbers would not fit."""
    means = np.array([column[group_of_row == g].mean() for g in np.unique(group_of_row)])
    spread = means.max() - means.min()
    values = tuple(_short_number(m) for m in means)
    if spread < 1e-9 or max(map(len, values)) > 4:
        return None
    heights = (means - means.min() + 0.3 * spread) / (1.3 * spread)
    ordered = np.sort(heights)
    if len(heights) > 2 and (ordered[-1] - ordered[-2] < 0.12 or ordered[1] - ordered[0] < 0.12):
        return None
    return Chart(table, title, grouping, values, tuple(round(float(h), 4) for h in heights))


def _short_number(value: float) -> str:
    """Two significant digits without an exponent."""
    rounded = float(f"{value:.2g}")
    return str(int(rounded)) if abs(rounded) >= 10 or rounded == int(rounded) else f"{rounded:g}"


def _short_title(name: str) -> str:
    """A column's name, short enough for the width of a chart."""
    title = name.replace("_", " ").replace("(cm)", "").strip()
    for long, short in _ABBREVIATIONS.items():
        title = title.replace(long, short)
    return title
