"""Scorers by hand-made cases."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.evaluation.scorers import (
    SCORERS,
    anls,
    best_score,
    bits_per_byte,
    character_accuracy,
    contains,
    edit_distance,
    exact_match,
    last_number,
    relaxed_number,
)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("7", "7", 1), (" Seven.\n", "seven", 1), ("“7”", "7", 0), ('"7"', "7", 1), ("\uff17", "7", 1), ("7 8", "7  8", 1), ("17", "7", 0),
        ("", "7", 0), ("?", "", 0), ("?", "?", 1), (".5", "5", 0), ("-5", "5", 0),
    ],
)  # fmt: skip
def test_exact_match(answer, truth, score):
    assert exact_match(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("It is a 1.", "1", 1),
        ("10", "1", 0),
        ("the Red one", "red", 1),
        ("reddish", "red", 0),
        ("x", "", 0),
        ("", "", 1),
        ("a+b = c", "a+b", 1),
    ],
)
def test_contains_wants_whole_words(answer, truth, score):
    assert contains(answer, truth) == score


@pytest.mark.parametrize(("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@given(st.text("ab", max_size=8), st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_edit_distance_is_a_metric(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_character_accuracy():
    assert character_accuracy("abcd", "abcd") == 1.0
    assert character_accuracy("abcx", "abcd") == 0.75
    assert character_accuracy("abcd  e\n", "abcd e") == 1.0
    assert character_accuracy("a very long wrong answer", "no") == 0.0
    assert character_accuracy("", "") == 1.0
    assert character_accuracy("x", "") == 0.0


def test_anls_takes_the_best_truth_and_cuts_at_the_threshold():
    assert anls("Hello", "hello") == 1.0
    assert anls("hallo", "hello") == 0.8
    assert anls("hallo", ["goodbye", "hallo!"]) == pytest.approx(5 / 6)
    assert anls("ab", "cd") == 0.0
    assert anls("ab", "ax") == 0.0  # distance 1 of 2 is not below one half
    assert anls("", "") == 1.0


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("-95", "-100", 1), ("0", "0", 1), ("0.001", "0", 0),
        ("1,234", "1234", 1), ("$12", "12", 1), ("12%", "12", 1), (".5", "0.5", 1),
        ("1e3", "1000", 1), ("red", "Red", 1),
        ("red", "5", 0), ("5.", "5", 1),
        ("1,2", "12", 0), ("", "5", 0), ("12 apples", "12", 0),
    ],
)  # fmt: skip
def test_relaxed_number(answer, truth, score):
    assert relaxed_number(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("3 + 4 = 7 apples.\n#### 7", "7", 1), ("So it is 1,200.", "1200", 1), ("7, or 8", "7", 0), ("$18.50.", "18.5", 1),
        ("10-5=5", "5", 1), ("it falls to -5", "-5", 1), ("none", "7", 0), ("", "7", 0), ("x7", "7", 0), ("1e3", "1000", 1),
        (".5", "0.5", 1), ("Ann", "ann", 1),
    ],
)  # fmt: skip
def test_last_number(answer, truth, score):
    assert last_number(answer, truth) == score


def test_any_of_several_truths_will_do():
    assert best_score("exact_match", "a cat", ["dog", "A cat."]) == 1.0
    assert best_score("anls", "hallo", ["goodbye", "hallo!"]) == pytest.approx(5 / 6)
    assert best_score("contains", "a dog", ["cat", "cow"]) == 0.0


def test_bits_per_byte():
    assert bits_per_byte(100 * math.log(2), 50) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)


@given(st.text(max_size=20), st.text(max_size=20))
def test_every_scorer_stays_between_0_and_1_and_gives_1_to_the_truth(answer, truth):
    for score in SCORERS.values():
        assert 0.0 <= score(answer, truth) <= 1.0
        assert score(truth, truth) == 1.0
