"""Mixtures: what may be stated, repeats told beforehand, the settings of the paper."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from mixture_tools import TWO, corpus_of, mixtures, stated, three_sources

from taia.errors import DataError, RecipeError
from taia.recipe import load_data, place_data
from taia.training.mixture import SCHEDULES, Mixture, parse_data
from taia.training.settings import Settings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return three_sources(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "empty"),
        ({"sources": []}, "empty"),
        ({"sources": TWO, "schedul": "staged"}, "did you mean 'schedule'"),
        ({"sources": TWO, "schedule": "stagd"}, "did you mean 'staged'"),
        ([{"from": "a", "shar": 1}], "did you mean 'share'"),
        ([{"name": "a"}], "needs from"),
        ([{"from": "a", "share": 0.5}, {"from": "b", "share": 0.4}], "sum to 0.9; they must"),
        ([{"from": "a", "share": 0.5}, {"from": "b"}], "b: no share"),
        ([{"from": "a", "share": {0: 0, 1: 1}}, {"from": "b", "share": 1}], "at progress"),
        ([{"from": "a", "share": {0.1: 1, 1: 1}}], "from progress 0 up to 1"),
        ([{"from": "a", "share": {0: 2, 1: 1}}], "between 0 and 1"),
        ([{"from": "a", "share": "half"}], "'half'"),
        ([{"from": "a", "share": True}], "True"),
        ([{"from": "a", "share": float("nan")}], "nan"),
        ([{"from": "x/a"}, {"from": "y/a"}], "named twice"),
        ([{"from": "a", "name": "a b"}], "letters, digits"),
        ({"sources": TWO, "size": 0}, "size is 0"),
        ({"sources": TWO, "size": 1.5}, "size is 1.5"),
        ({"sources": TWO, "repeat": "yes"}, "repeat is 'yes'"),
        ({"sources": TWO, "remove_overlap": True}, "needs held_out"),
        ({"sources": [{"from": "a"}], "schedule": "annealed"}, "no source has it"),
        ({"sources": [{"from": "a", "ood": True}], "schedule": "rising"}, "every source has it"),
        ({"sources": [{"from": "a", "share": {0: 1, 1: 1}}], "schedule": "staged"}, "curve"),
        ({"target": "a", "by": "b"}, "either replace or add"),
        ({"target": "a", "by": "b", "replace": 0.5, "add": 1}, "either replace or add"),
        ({"target": "a", "by": "b", "replace": 1.5, "size": 9}, "between 0 and 1"),
        ({"target": "a", "by": "b", "add": -1, "size": 9}, "at least 0"),
        ({"target": "a", "by": "b", "add": 1}, "needs size"),
        ({"target": "a", "sources": TWO}, "give sources"),
        (3, "not 3"),
    ],
)
def test_what_states_no_mixture_is_refused(data, told):
    with pytest.raises(RecipeError, match=told):
        Mixture.parse(data)


def test_all_faults_of_a_mixture_are_told_together():
    data = {"sources": [{"from": "a", "x": 1}, {"name": "b"}], "size": -1, "zzz": 1}
    with pytest.raises(RecipeError) as caught:
        Mixture.parse(data)
    assert len(caught.value.faults) == 4


@given(mixtures())
def test_the_plain_form_reads_back(mixture):
    assert Mixture.parse(json.loads(json.dumps(mixture.plain()))) == mixture
    assert parse_data(mixture.plain()) == mixture.plain()


def test_the_settings_of_the_paper_in_one_line(place):
    def used(text):
        return [part.used for part in corpus_of(place_data(load_data(text), place)).parts]

    at = f"target: {place}/a.jsonl, by: {place}/b.jsonl, size: 20"
    assert used(f"{{{at}, replace: 0.4}}") == [12, 8]
    assert used(f"{{{at}, replace: 0.0}}") == [20, 0]
    assert used(f"{{{at}, replace: 1.0}}") == [0, 20]
    assert used(f"{{{at}, add: 0.5}}") == [20, 10]
    assert used(f"{{{at}, add: 0.5, schedule: annealed}}") == [20, 10]


def test_without_a_size_nothing_comes_twice(place):
    data = place_data(TWO, place)
    corpus = corpus_of(data)
    assert [part.used for part in corpus.parts] == [30, 20]
    assert max(Counter(corpus.order).values()) == 1
    bare = place_data([{"from": "a.jsonl"}, {"from": "c.jsonl"}], place)
    assert sorted(corpus_of(bare).order) == list(range(34))
    assert len(corpus_of(bare, epochs=2.5).order) == 85


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_repeats_are_refused_or_asked_for(schedule, place):
    sources = [{"from": "a.jsonl", "share": 0.5}, {"from": "c.jsonl", "share": 0.5, "ood": True}]
    data = {"sources": sources, "schedule": schedule, "size": 40}
    with pytest.raises(RecipeError) as caught:
        corpus_of(place_data(data, place))
    (fault,) = caught.value.faults
    assert "c: 20 examples are needed and 4 are there" in fault
    assert "5.00 times" in fault
    corpus = corpus_of(place_data(data | {"repeat": True}, place))
    assert corpus.parts[1].repeats == 5
    with pytest.raises(RecipeError, match="repeat: true"):
        corpus_of(place_data(TWO, place), max_steps=50)
    with pytest.raises(RecipeError, match="max_examples with a mixture"):
        Settings(base="b", data=place_data(TWO, place), max_examples=3).check()


def test_faults_of_all_sources_are_told_together(place, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    data = [{"from": str(tmp_path / "bad.jsonl")}, {"from": str(place / "none.jsonl")}]
    with pytest.raises(DataError) as caught:
        corpus_of(parse_data(data))
    assert len(caught.value.faults) == 2
    assert "bad.jsonl:2: " in caught.value.faults[0]


def test_realised_shares_are_those_of_the_batches(place):
    corpus = corpus_of(stated(place, "annealed"))
    shares = corpus.shares(4)
    assert len(shares) == 10
    assert all(sum(step.values()) == pytest.approx(1) for step in shares)
    falls = [step["share_b"] for step in shares]
    assert sum(falls) / 10 == pytest.approx(0.4)
    assert sum(falls[:5]) > sum(falls[5:]) + 1
