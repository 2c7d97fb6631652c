"""Advice: what is planted is found, what is not there is not, and every word has its number."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
from run_tools import SELECTIONS, simulated, write_run

from taia.errors import EvaluationError, RecipeError
from taia.evaluation import statistics
from taia.evaluation.advise import CANNOT_TELL, advise, read_advice
from taia.evaluation.choice import choose, split
from taia.evaluation.mismatch import word_distance
from taia.evaluation.result import read_results
from taia.report import report

NOTHING = dict.fromkeys(SELECTIONS, 0.0)
PLANTED = {
    "base": {"base": 0.0, "vanilla": -0.1, "taia": -0.1, "taif": -0.1},
    "vanilla": {"base": 0.0, "vanilla": 0.12, "taia": 0.0, "taif": 0.0},
    "taia": {"base": 0.0, "vanilla": -0.05, "taia": 0.1, "taif": -0.1},
    "taif": {"base": 0.0, "vanilla": -0.05, "taia": -0.1, "taif": 0.1},
}


@pytest.fixture
def quick(monkeypatch):
    """Coarser p values, and no search for garbage among all that the suite has loaded."""
    monkeypatch.setattr(statistics, "FLIPS", 999)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("best", PLANTED)
def test_what_is_planted_is_recommended(tmp_path, best):
    run = write_run(tmp_path, simulated(PLANTED[best], 1200))
    advice = advise(run)
    assert advice.variant == best
    assert advice.recommendation == (best if best != "taif" else "another selection")
    assert f"Recommended: {advice.recommendation}" in advice.paragraph
    assert advice.choice.needed == 0


def test_that_the_whole_fine_tune_is_missing_is_told(tmp_path):
    advice = advise(write_run(tmp_path, simulated({"base": 0.0, "taia": 0.4}, 300)))
    assert advice.recommendation == "taia"
    assert advice.paragraph.endswith(
        "The whole fine-tune is not in this run, so it may be better still."
    )


def test_without_a_difference_one_cannot_tell(tmp_path):
    advice = advise(write_run(tmp_path, simulated(NOTHING, 100)))
    assert (advice.recommendation, advice.variant) == (CANNOT_TELL, "")
    assert advice.choice.needed is None or advice.choice.needed > 200
    assert "One cannot tell with so many examples" in advice.paragraph


@pytest.mark.slow
def test_two_that_are_equal_are_told_apart_as_rarely_as_stated(quick):
    """With one pair there is nothing to correct: advice is given at about the 5% of its tests."""
    pair = {"base": 0.0, "taia": 0.0}
    given = [choose(simulated(pair, 200, seed=seed), SELECTIONS, {}, seed=seed).chosen
             for seed in range(600)]  # fmt: skip
    assert 0.02 <= np.mean(given) <= 0.07


@pytest.mark.slow
def test_four_that_are_equal_are_told_apart_more_rarely(quick):
    given = [choose(simulated(NOTHING, 200, seed=seed), SELECTIONS, {}, seed=seed).chosen
             for seed in range(200)]  # fmt: skip
    assert np.mean(given) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("best", PLANTED)
def test_wrong_advice_is_rare_and_right_advice_is_not(quick, best):
    told = [choose(simulated(PLANTED[best], 600, seed=seed), SELECTIONS, {}, seed=seed)
            for seed in range(100)]  # fmt: skip
    leaders = [choice.leader for choice in told if choice.chosen]
    assert len(leaders) > 50
    assert sum(leader != best for leader in leaders) <= 5


@pytest.mark.slow
def test_the_number_of_examples_needed_would_tell(quick):
    """As many as it says, where the difference it saw is the true one, tell in most cases."""
    choice = choose(simulated({"base": 0.0, "taia": 0.02}, 200, seed=1), SELECTIONS, {})
    assert not choice.chosen
    assert choice.needed
    (row,) = choice.development.differences.values()
    seen = row["mean"] if choice.leader == "taia" else -row["mean"]
    again = {"base": 0.0, "taia": seen}
    told = [choose(simulated(again, choice.needed // 2, seed=seed), SELECTIONS, {}).chosen
            for seed in range(40)]  # fmt: skip
    assert np.mean(told) > 0.5


@pytest.mark.slow
def test_a_leader_among_parts_needs_to_beat_only_base_and_vanilla():
    """Two names for the same answers cannot be told apart, and need not be."""
    answers = simulated(PLANTED["taia"], 1200)
    answers["half"] = answers["taia"]
    choice = choose(answers, SELECTIONS | {"half": "attention*0.5"}, {})
    assert (choice.leader, choice.chosen) == ("taia", True)
    assert choice.rivals == ("half",)
    answers["twin"] = answers["base"]
    same = choose(
        {name: answers[name] for name in ("base", "twin")}, SELECTIONS | {"twin": "ffn"}, {}
    )
    assert not same.chosen
    assert same.needed is None


def test_the_split_is_seeded_whole_and_a_tasks_own():
    sizes = {"a": 101, "b": 2, "c": 60}
    parts = split(sizes, 0.5, 0)
    for task, (chosen, rest) in parts.items():
        assert sorted([*chosen, *rest]) == list(range(sizes[task]))
        assert len(chosen) > 0
        assert len(rest) > 0
    assert all(np.array_equal(*pair) for pair in zip(parts["a"], split({"a": 101}, 0.5, 0)["a"],
                                                     strict=True))  # fmt: skip
    assert not np.array_equal(parts["a"][0], split(sizes, 0.5, 1)["a"][0])


@pytest.mark.slow
def test_both_sides_of_the_split_are_shown_and_written(tmp_path):
    run = write_run(tmp_path, simulated(PLANTED["taia"], 400))
    advice = advise(run, development=0.25, seed=3)
    written = json.loads((run / "advice.json").read_text())
    assert written == json.loads(json.dumps(advice.to_json()))
    assert advice.choice.development.examples == 200
    assert advice.choice.rest.examples == 600
    for half in (advice.choice.development, advice.choice.rest):
        assert f"{100 * half.scores[advice.choice.leader].mean:.1f}%" in advice.paragraph
    assert advise(run, development=0.25, seed=3) == advice


@pytest.mark.slow
def test_the_report_shows_advice_of_these_results_only(tmp_path):
    answers = simulated(PLANTED["taia"], 400)
    run = write_run(tmp_path, answers)
    assert 'id="advice"' not in report(run).read_text()
    advice = advise(run)
    page = report(run).read_text()
    assert 'id="advice"' in page
    assert advice.paragraph.split(".")[0] in page
    answers["taia"]["task0"][0] = 1 - answers["taia"]["task0"][0]
    write_run(tmp_path, answers)
    assert read_advice(read_results(run)) is None
    assert 'id="advice"' not in report(run).read_text()


@pytest.mark.slow
def test_a_base_that_guesses_is_told(tmp_path):
    run = write_run(tmp_path, simulated(NOTHING, 100, accuracy=0.27))
    advice = advise(run)
    assert [one.guessing for one in advice.base] == [0.25, 0.25]
    assert "task0 and task1 the base is not distinguishably above guessing" in advice.paragraph
    free = advise(write_run(tmp_path / "free", simulated(NOTHING, 100, accuracy=0.27), choices=0))
    assert "guessing" not in free.paragraph


@pytest.mark.slow
def test_training_text_is_measured_where_it_can_be_read(tmp_path):
    asked = [{"id": str(n), "question": f"which mammal swims in water {n % 7}"} for n in range(90)]
    chats = [
        {"messages": [{"role": "user", "content": f"invoice total {n % 9} euros"},
                      {"role": "assistant", "content": "please pay the amount"}]}
        for n in range(90)
    ]  # fmt: skip
    for name, records in (("asked.jsonl", asked), ("chats.jsonl", chats)):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "train").mkdir()
    facts = {"settings": {"data": str(tmp_path / "chats.jsonl"), "max_examples": None}}
    (tmp_path / "train" / "train.json").write_text(json.dumps(facts))
    answers = simulated(NOTHING, 90, tasks=1)
    run = write_run(tmp_path, answers, sources={"task0": str(tmp_path / "asked.jsonl")})
    advice = advise(run)
    (found,) = advice.mismatch
    assert 0 <= found.yardstick < 0.3 < 0.7 < found.distance <= 1
    assert f"{found.distance:.2f} from the questions" in advice.paragraph
    (tmp_path / "asked.jsonl").write_text("[1]\n")  # no longer what was asked
    changed = advise(run)
    assert changed.mismatch == ()
    assert "were changed since" in changed.paragraph
    (tmp_path / "chats.jsonl").unlink()
    missing = advise(run)
    assert missing.mismatch == ()
    assert "not measured: the training text cannot be read" in missing.paragraph


def test_word_distance_knows_its_ends():
    one = [["a", "b", "c", "d"]] * 200
    same = word_distance("t", one, one)
    assert same is not None
    assert (same.distance, same.yardstick) == (pytest.approx(0), pytest.approx(0))
    other = word_distance("t", [["x", "y"]] * 200, one)
    assert other is not None
    assert other.distance == pytest.approx(1)
    assert word_distance("t", [["a"]] * 10, one) is None


def test_runs_that_allow_no_advice(tmp_path):
    answers = simulated({"base": 0.0, "taia": 0.0}, 1)
    with pytest.raises(EvaluationError, match="two examples"):
        advise(write_run(tmp_path / "small", answers))
    with pytest.raises(EvaluationError, match="--variants base,vanilla,taia"):
        advise(write_run(tmp_path / "bare", {"taia": answers["taia"]}))
    run = write_run(tmp_path / "one", simulated({"base": 0.0, "taia": 0.0}, 20))
    with pytest.raises(RecipeError, match="between 0 and 1"):
        advise(run, development=1.0)
    with pytest.raises(RecipeError, match="seed -1"):
        advise(run, seed=-1)
    assert not (run / "advice.json").exists()
