"""What the demo's samples look like, stage by stage.

A kind of sample is a function of (rng, materials); a stage is a table of kinds with their shares (`MIXTURES`). Sample `index` of a stage
depends on (seed, stage, index) alone, so the samples are the same however many processes make them.

Base-model stages use documents (VL §3.1, VL2 §3.2): one message of role "document", the caption after its image. Fine-tuning uses
conversations. Of each question the first wording is the one that the evaluation asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from data_recipes.demo.images import TILE, chart_image, digit_image, page_image, random_jitter, side_by_side, word_image, wrap_words
from data_recipes.demo.materials import Chart, Digit, Materials
from data_recipes.demo.texts import first_sentence

Message = dict[str, str]

DIGIT_QUESTIONS = ("What digit is this?", "Which digit is shown?", "Read the digit.")
ROW_QUESTIONS = ("Which digits are these?", "Read the digits from left to right.")
WORD_QUESTIONS = ("Read the word.", "What word is this?", "Which word is written here?")
SPELL_QUESTION = "Spell the word."
PAGE_QUESTIONS = ("Read the page.", "What is written on this page?")
COUNT_QUESTIONS = ("How many bars are there?", "How many bars does the chart have?")
HIGHEST_QUESTIONS = ("Which bar is the highest?", "Which is the highest bar?")
LOWEST_QUESTIONS = ("Which bar is the lowest?", "Which is the lowest bar?")
TABLE_QUESTIONS = ("What are the values?", "Give the chart as a table.")
SYSTEM_PROMPTS = ("Answer briefly.", "You read images. Answer in a few words.")
_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PAGES = ((2, 2, 3), (3, 2, 3), (3, 2, 4), (3, 3, 5))
"""Tiles wide, tiles high, lines at most."""


@dataclass
class DemoSample:
    kind: str
    messages: list[Message]
    images: list[Image.Image]


Maker = Callable[[Random, Materials], DemoSample]


def make_sample(stage: str, index: int, seed: int, materials: Materials) -> DemoSample:
    """Sample `index` of a stage of MIXTURES."""
    rng = Random(f"{seed}/{stage}/{index}")
    makers, shares = zip(*MIXTURES[stage], strict=True)
    maker: Maker = rng.choices(makers, shares)[0]
    return maker(rng, materials)


def _wording(rng: Random, questions: Sequence[str]) -> str:
    return questions[0] if len(questions) == 1 or rng.random() < 0.6 else rng.choice(questions[1:])


def _document(kind: str, content: str, *images: Image.Image) -> DemoSample:
    return DemoSample(kind, [{"role": "document", "content": content}], list(images))


def _conversation(rng: Random, kind: str, turns: Sequence[tuple[str, str]], *images: Image.Image) -> DemoSample:
    """Turns of (question, answer); the images stand before the first question, now and then a system prompt before all."""
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.1 else []
    for number, (question, answer) in enumerate(turns):
        content = "<image>\n" * len(images) + question if number == 0 else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return DemoSample(kind, messages, list(images))


# ------------------------------------------------------------------------------------------------------------------ pieces


def _draw_digit(rng: Random, materials: Materials) -> tuple[Digit, Image.Image]:
    digit = rng.choice(materials.digits)
    return digit, digit_image(digit.scan, random_jitter(rng))


def _draw_row(rng: Random, materials: Materials) -> tuple[str, list[Image.Image]]:
    drawn = [_draw_digit(rng, materials) for _ in range(rng.choice((2, 2, 3)))]
    return " ".join(str(d.label) for d, _ in drawn), [image for _, image in drawn]


def _draw_page(rng: Random, materials: Materials) -> tuple[str, Image.Image]:
    wide, high, most = rng.choice(_PAGES)
    lines = wrap_words(rng.choice(materials.passages), wide * TILE, rng.randint(2, most))
    return "\n".join(lines), page_image(lines, wide * TILE, high * TILE, rng)


def _draw_chart(rng: Random, materials: Materials) -> tuple[Chart, Image.Image]:
    bars = rng.choice((2, 3, 4))
    chart = rng.choice(materials.charts)
    for _ in range(20):
        if len(chart.values) == bars:
            break
        chart = rng.choice(materials.charts)
    return chart, chart_image(chart.title, chart.heights, chart.values, rng)


def chart_table(chart: Chart) -> str:
    return "\n".join(f"{chr(ord('A') + i)} {value}" for i, value in enumerate(chart.values))


def spelled(word: str) -> str:
    return " ".join(word)


# ---------------------------------------------------------------------------------------------------------- base-model kinds


def caption_digit(rng: Random, materials: Materials) -> DemoSample:
    digit, image = _draw_digit(rng, materials)
    caption = rng.choice((str(digit.label), str(digit.label), f"the digit {_DIGIT_NAMES[digit.label]}"))
    return _document("caption_digit", f"<image>\n{caption}", image)


def caption_row(rng: Random, materials: Materials) -> DemoSample:
    """Several digits in one wide image, so several tiles."""
    labels, images = _draw_row(rng, materials)
    return _document("caption_row", f"<image>\n{labels}", side_by_side(images))


def ocr_word(rng: Random, materials: Materials) -> DemoSample:
    word = rng.choice(materials.words)
    return _document("ocr_word", f"<image>\n{word if rng.random() < 0.6 else spelled(word)}", word_image(word, rng))


def ocr_page(rng: Random, materials: Materials) -> DemoSample:
    text, image = _draw_page(rng, materials)
    return _document("ocr_page", f"<image>\n{text}", image)


def caption_chart(rng: Random, materials: Materials) -> DemoSample:
    chart, image = _draw_chart(rng, materials)
    return _document("caption_chart", f"<image>\na chart with {len(chart.values)} bars: {chart.title}", image)


def chart_to_table(rng: Random, materials: Materials) -> DemoSample:
    chart, image = _draw_chart(rng, materials)
    return _document("chart_to_table", f"<image>\n{chart_table(chart)}", image)


def interleaved(rng: Random, materials: Materials) -> DemoSample:
    """Text with two or three images in it: a list of digits, or a glossary whose terms are pictures too."""
    if rng.random() < 0.8:
        drawn = [_draw_digit(rng, materials) for _ in range(rng.randint(2, 3))]
        lines = [f"{n}. <image> is the digit {d.label}." for n, (d, _) in enumerate(drawn, 1)]
        return _document("interleaved", "\n".join(lines), *(image for _, image in drawn))
    chosen: list[str] = []
    images = []
    for _ in range(2):
        entry = rng.choice(materials.entries)
        word = rng.choice(materials.words)
        chosen.append(f"<image>\n{word}\n{first_sentence(entry.text)}")
        images.append(word_image(word, rng))
    return _document("interleaved", "\n\n".join(chosen), *images)


# --------------------------------------------------------------------------------------------------------- conversation kinds


def ask_digit(rng: Random, materials: Materials) -> DemoSample:
    digit, image = _draw_digit(rng, materials)
    turns = [(_wording(rng, DIGIT_QUESTIONS), str(digit.label))]
    if rng.random() < 0.25:
        follow_ups = (
            ("Is it even or odd?", "odd" if digit.label % 2 else "even"),
            ("What is one more than that?", str(digit.label + 1)),
            ("Is it more than 4?", "yes" if digit.label > 4 else "no"),
            ("Write it in letters.", _DIGIT_NAMES[digit.label]),
        )
        turns += rng.sample(follow_ups, rng.randint(1, 2))
    return _conversation(rng, "ask_digit", turns, image)


def ask_row(rng: Random, materials: Materials) -> DemoSample:
    """Several digits side by side in one image, or one digit in each of several images."""
    labels, images = _draw_row(rng, materials)
    turns = [(_wording(rng, ROW_QUESTIONS), labels)]
    if rng.random() < 0.3:
        turns.append(("Which is the largest?", max(labels.split())))
    return _conversation(rng, "ask_row", turns, *([side_by_side(images)] if rng.random() < 0.5 else images))


def ask_word(rng: Random, materials: Materials) -> DemoSample:
    word = rng.choice(materials.words)
    turns = [(_wording(rng, WORD_QUESTIONS), word)]
    if rng.random() < 0.4:
        turns.append((SPELL_QUESTION, spelled(word)))
        rng.shuffle(turns)
    return _conversation(rng, "ask_word", turns, word_image(word, rng))


def ask_page(rng: Random, materials: Materials) -> DemoSample:
    text, image = _draw_page(rng, materials)
    return _conversation(rng, "ask_page", [(_wording(rng, PAGE_QUESTIONS), text)], image)


def ask_chart(rng: Random, materials: Materials) -> DemoSample:
    chart, image = _draw_chart(rng, materials)
    turns = [
        (_wording(rng, COUNT_QUESTIONS), str(len(chart.values))),
        (_wording(rng, HIGHEST_QUESTIONS), chart.highest),
        (_wording(rng, LOWEST_QUESTIONS), chart.lowest),
        (_wording(rng, TABLE_QUESTIONS), chart_table(chart)),
    ]
    return _conversation(rng, "ask_chart", rng.sample(turns, rng.randint(1, 3)), image)


def ask_docs(rng: Random, materials: Materials) -> DemoSample:
    """A dialogue about the standard library, without images."""
    entries = rng.sample(materials.entries, rng.choice((1, 1, 2)))
    turns = [(f"What does {e.name} do?" if "." in e.name else f"What is {e.name}?", first_sentence(e.text)) for e in entries]
    return _conversation(rng, "ask_docs", turns)


MIXTURES: dict[str, tuple[tuple[Maker, float], ...]] = {
    "align": ((caption_digit, 0.60), (caption_row, 0.20), (ocr_word, 0.10), (caption_chart, 0.10)),
    "pretrain": (
        (caption_digit, 0.38),
        (caption_row, 0.15),
        (ocr_word, 0.10),
        (ocr_page, 0.03),
        (interleaved, 0.06),
        (caption_chart, 0.03),
        (chart_to_table, 0.03),
        # A small share of conversations, so that the base model can be asked already (VL §3.2.2).
        (ask_digit, 0.18),
        (ask_word, 0.02),
        (ask_chart, 0.02),
    ),
    "sft": ((ask_digit, 0.66), (ask_row, 0.15), (ask_word, 0.08), (ask_page, 0.03), (ask_chart, 0.08)),
    "sft_text": ((ask_docs, 1.0),),
}
"""Stage folder -> kinds and their shares."""
