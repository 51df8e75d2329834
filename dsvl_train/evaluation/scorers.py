"""Scorers: an answer and a truth in, a number between 0 and 1 out. Pure text, no model.

`SCORERS` maps the names that evaluation files use to these functions.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

Scorer = Callable[[str, str], float]

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?([eE][+-]?\d+)?")
_NUMBERS_IN_TEXT = re.compile(r"(?<![\w.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_OPENING = " \"'`([{"
_CLOSING = " .,;:!?\"'`)]}"


def normalise(text: str) -> str:
    """Text as `exact_match` and `contains` compare it: NFKC, lower case, single spaces, no opening quotes and brackets before it and no
    closing ones or sentence marks after it. Text of nothing else stays as it is."""
    spaced = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return spaced.lstrip(_OPENING).rstrip(_CLOSING) or spaced


def exact_match(answer: str, truth: str) -> float:
    """1 when both are the same after `normalise`."""
    return float(normalise(answer) == normalise(truth))


def contains(answer: str, truth: str) -> float:
    """1 when the normalised truth stands in the answer as whole words: "1" is in "a 1." and not in "10". An empty truth is in nothing
    but an empty answer."""
    wanted, given = normalise(truth), normalise(answer)
    if not wanted:
        return float(not given)
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", given) is not None)


def character_accuracy(answer: str, truth: str) -> float:
    """1 - edit distance / length of the truth, not below 0: how much of a transcription is right. Runs of white space count as one
    space; case and punctuation count. With an empty truth, 1 for an empty answer and 0 for any other."""
    given, wanted = " ".join(answer.split()), " ".join(truth.split())
    if not wanted:
        return float(not given)
    return max(0.0, 1.0 - edit_distance(given, wanted) / len(wanted))


def anls(answer: str, truths: str | Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question, as in DocVQA: the best over the truths of 1 - distance / longer
    length, and 0 where that distance is not below the threshold. Lower case, single spaces."""
    wanted = [truths] if isinstance(truths, str) else list(truths)
    given = " ".join(answer.casefold().split())
    best = 0.0
    for truth in (" ".join(text.casefold().split()) for text in wanted):
        longer = max(len(given), len(truth))
        distance = edit_distance(given, truth) / longer if longer else 0.0
        best = max(best, 1.0 - distance if distance < threshold else 0.0)
    return best


def relaxed_number(answer: str, truth: str, tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy: a number may be off by `tolerance` of the truth (a truth of 0 must be met exactly); anything else
    must match exactly after `normalise`. Thousands separators, a currency sign before and a percent sign after are dropped."""
    wanted, given = _number(truth), _number(answer)
    if wanted is None or given is None:
        return exact_match(answer, truth)
    # The margin is for floats only: 105 against 100 is within 5 %.
    return float(abs(given - wanted) <= tolerance * abs(wanted) * (1.0 + 1e-9))


def last_number(answer: str, truth: str) -> float:
    """1 when the last number in the answer is the truth, which is a number (GSM8K). Thousands separators are dropped; a sentence mark
    after the number is not taken for a decimal point. A truth that is no number must match exactly."""
    wanted, given = _number(truth), _number(answer)
    if wanted is None:
        return exact_match(answer, truth)
    if given is not None:
        return float(given == wanted)
    found = _NUMBERS_IN_TEXT.findall(unicodedata.normalize("NFKC", answer))
    return float(bool(found) and float(found[-1].replace(",", "")) == wanted)


def best_score(metric: str, answer: str, truths: Sequence[str]) -> float:
    """The best of a metric over several truths, any of which will do."""
    return max(SCORERS[metric](answer, truth) for truth in truths)


def bits_per_byte(nll_nats_sum: float, n_bytes: int) -> float:
    """Negative log-likelihood of a text, summed in nats, as bits per UTF-8 byte: comparable between tokenizers.

    Raises ValueError where there are no bytes.
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte of {n_bytes} bytes; a text of at least one byte is needed")
    return nll_nats_sum / (math.log(2.0) * n_bytes)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, ca in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, cb in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (ca != cb))
    return row[-1]


def _number(text: str) -> float | None:
    bare = unicodedata.normalize("NFKC", text).strip().lstrip(_OPENING).rstrip(_CLOSING).lstrip("$€£").rstrip("%").strip()
    if not any(c.isdigit() for c in bare) or not _NUMBER.fullmatch(bare):
        return None
    return float(bare.replace(",", ""))


SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "contains": contains,
    "character_accuracy": character_accuracy,
    "anls": anls,
    "relaxed_number": relaxed_number,
    "last_number": last_number,
}
"""Scorers by the name that an evaluation file gives as a task's metric."""
