"""The page of a training: the shares of a mixture, step by step, against the stated ones."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from mixture_tools import TWO, corpus_of, stated, three_sources

from taia.errors import DataError
from taia.report_shares import POINTS, share_charts
from taia.report_training import is_training, report_training
from taia.training.mixture import SCHEDULES


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return three_sources(tmp_path_factory.mktemp("data"))


def finished(place, schedule="annealed", batch=4):
    """Log and train.json of a mixed training, as a run writes them."""
    data = stated(place, schedule)
    corpus = corpus_of(data, batch_size=batch)
    shares = corpus.shares(batch)
    log = [
        {"step": at, "steps": len(shares), "loss": 3.0 - at / len(shares), **share}
        for at, share in enumerate(shares, start=1)
    ]
    return log, {"method": "lora", "data": {"path": data, "parts": corpus.facts()}}


def points(text):
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_realised_shares_stand_beside_the_stated_curve(schedule, place):
    log, training = finished(place, schedule)
    charts = share_charts(log, training)
    assert [chart.name for chart in charts] == ["a", "b"]
    assert [chart.total for chart in charts] == ["60.0%", "40.0%"]
    for chart in charts:
        realised, curve = points(chart.realised), points(chart.stated)
        assert len(realised) == len(log)
        assert [x for x, _ in curve] == sorted(x for x, _ in curve)
        assert (curve[0][0], curve[-1][0]) == (0.0, 1000.0)
        shares = [1 - y / 300 for _, y in realised]
        expected = [line[f"share_{chart.name}"] for line in log]
        assert shares == pytest.approx(expected, abs=1e-3)
        total = sum(shares) / len(shares)
        area = sum(
            (right - left) / 1000 * (2 - (low + high) / 300) / 2
            for (left, low), (right, high) in itertools.pairwise(curve)
        )
        assert area == pytest.approx(total, abs=0.5 / len(log))


def test_long_runs_are_averaged(place):
    log, training = finished(place)
    long = [line | {"step": at, "steps": 9 * POINTS} for at, line in enumerate(log * POINTS)]
    assert len(points(share_charts(long, training)[0].realised)) <= POINTS


def test_one_source_or_no_record_has_no_charts(place):
    log, training = finished(place)
    assert share_charts(log, {}) == share_charts([], training) == ()
    one = {"data": {"path": "a.jsonl", "parts": training["data"]["parts"][:1]}}
    assert share_charts(log, one) == ()


def test_the_page_of_a_training_folder(place, tmp_path):
    log, training = finished(place)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    assert not is_training(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(training))
    assert is_training(tmp_path)
    text = report_training(tmp_path).read_text("utf-8")
    assert text.count("<polyline") == 2 * (1 + len(TWO))
    assert "Share of b over the steps" in text
    assert "Training loss over 10 steps" in text
    assert not re.search(r"https?://", text)
    (tmp_path / "log.jsonl").write_text("{")
    with pytest.raises(DataError, match="not the log"):
        report_training(tmp_path)
