"""Generated answers: known right, known wrong, not to be read; and the data's own solutions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taia.evaluation.answers import (
    grade_free,
    grade_math,
    grade_span,
    grade_summary,
    read_answer,
)
from taia.evaluation.few_shot import worked_examples


def records(shared_data, name):
    lines = (shared_data / f"eval_{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("gold", "text", "right", "parsed"),
    [
        ("26", "So 24 + 2. The answer is 26.", 1, 1),
        ("26", "The answer is $26.00, i.e. 26 dollars", 1, 1),
        ("26", "The answer is 26 apples, not 27.", 1, 1),
        ("26", "24 + 2\n#### 26", 1, 1),
        ("26", "#### Step 1: add\n24 + 2\n#### Step 2: tell\nIt is 26", 1, 1),
        ("26", "The answer is 26.\n\n#### Checking\n26 - 2 = 24", 1, 1),
        ("26", "24 + 2\n#### 26\n\nLater 2 more", 1, 1),
        ("-5", "The answer is \N{MINUS SIGN}5.", 1, 1),
        ("26", "it is 26", 1, 1),
        ("26", "26. The answer is 27.", 0, 1),
        ("26", "The answer is not known.", 0, 0),
        ("26", "", 0, 0),
        ("0.5", "The answer is 1/2.", 1, 1),
        ("1,000", "The answer is 1000", 1, 1),
        (r"\frac{3}{4}", r"The answer is \frac{3}{4}.", 1, 1),
        (r"\frac{3}{4}", "The answer is 0.75", 1, 1),
        (r"\frac{3}{4}", r"so $\boxed{\frac{6}{8}}$.", 1, 1),
        (r"2\sqrt{2}", r"The answer is $\sqrt{8}$.", 1, 1),
        ("18", r"The answer is 18+2\pi.", 0, 1),
        ("2k+2", "The answer is 2(k+1).", 1, 1),
        (r"(-\infty, 0]", r"The answer is $(-\infty, 0]$.", 1, 1),
        (r"(-\infty, 0]", r"The answer is $(-\infty, 0)$.", 0, 1),
        (r"\text{Evelyn}", r"The answer is \text{Evelyn}.", 1, 1),
    ],
)
def test_mathematics(gold, text, right, parsed):
    assert grade_math({"answer": gold}, [text]) == {"math_verify": right, "parsed": parsed}


OPTIONS = "Which?\nOptions:\n(A) ice\n(B) fire\n(C) a salt"


@pytest.mark.parametrize(
    ("gold", "text", "right", "parsed"),
    [
        ("(B)", "So the answer is (B).", 1, 1),
        ("(B)", r"The final answer is: $\boxed{\text{B}}$", 1, 1),
        ("(B)", r"Thus \(\boxed{(B)}\)", 1, 1),
        ("(B)", r"The answer is \boxed{A}", 0, 1),
        ("Yes", 'The answer is "Yes".', 1, 1),
        ("b a d", "The answer is **b a d**.", 1, 1),
        ("(B)", "The answer is B.", 1, 1),
        ("(B)", "The answer is **(B)** fire", 1, 1),
        ("(B)", "The answer is (A).", 0, 1),
        ("(B)", "The answer is (Q).", 0, 0),
        ("(B)", "The answer is fire.", 0, 0),
        ("True", "not False. The answer is True.", 1, 1),
        ("True", "The answer is true", 1, 1),
        ("True", "The answer is False", 0, 1),
        ("no", "The answer is No.", 1, 1),
        ("invalid", "so the answer is invalid.", 1, 1),
        ("invalid", "so the answer is valid.", 0, 1),
        ("-11", "The answer is -11.", 1, 1),
        ("] >", "The answer is ] >.", 1, 1),
        ("] >", "The answer is ] ).", 0, 1),
        ("] >", "] >", 0, 0),
        ("ape bee", 'The answer is "ape, bee".', 1, 1),
        ("ape bee", "The answer is", 0, 0),
    ],
)
def test_free_answers(gold, text, right, parsed):
    doc = {"answer": gold, "question": OPTIONS}
    assert grade_free(doc, [text]) == {"exact_match": right, "parsed": parsed}


def test_spans_by_the_rules_of_squad():
    doc = {"answers": ["the Norman dynasty", "Normans"]}
    assert grade_span(doc, [" The Norman Dynasty."]) == {"f1": 1, "exact": 1, "parsed": 1}
    assert grade_span(doc, ["the first Norman kings"])["f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert grade_span(doc, ["unanswerable"]) == {"f1": 0, "exact": 0, "parsed": 1}
    assert grade_span(doc, [""]) == {"f1": 0, "exact": 0, "parsed": 0}
    nothing = {"answers": []}
    assert grade_span(nothing, ["Unanswerable."]) == {"f1": 1, "exact": 1, "parsed": 1}
    assert grade_span(nothing, ["Normans"]) == {"f1": 0, "exact": 0, "parsed": 1}
    assert grade_span(nothing, ["..."]) == {"f1": 0, "exact": 0, "parsed": 0}
    assert grade_span({"answers": ["A"]}, ["A"]) == {"f1": 1, "exact": 1, "parsed": 1}
    assert grade_span(nothing, [""]) == {"f1": 0, "exact": 0, "parsed": 0}


@pytest.mark.slow
def test_summaries_are_shares():
    doc = {"summary": "Ice melted in the north."}
    assert grade_summary(doc, ["Ice melted in the north."])["rougeL"] == 1
    assert 0 < grade_summary(doc, ["The ice of the north is melting."])["rougeL"] < 1
    assert grade_summary(doc, [" "]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0, "parsed": 0}


@given(st.text())
def test_what_follows_the_last_lead_in_is_read(text):
    answer, anchored = read_answer(text)
    assert answer in text
    assert read_answer(f"{text}. The answer is 7") == ("7", True)
    assert anchored or answer == text.strip()


TEXTS = st.text(alphabet=st.sampled_from("12.,-+^_{}()[]$\\ afrcsqtboxdeh=%/\n"), max_size=30)


@settings(deadline=None, max_examples=60)
@given(gold=st.sampled_from(["7", r"\frac{1}{2}", "(B)", "True", "] >", "x^2"]), text=TEXTS)
def test_no_text_raises_and_scores_are_shares(gold, text):
    doc = {"answer": gold, "question": OPTIONS, "answers": [gold], "summary": gold}
    for grade in (grade_math, grade_free, grade_span, grade_summary):
        for response in (text, f"The answer is {text}"):
            scores = grade(doc, [response])
            assert all(0 <= value <= 1 for value in scores.values())
            assert scores["parsed"] or not any(scores.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "grade", "metric"),
    [
        ("math500", grade_math, "math_verify"),
        ("gsm8k", grade_math, "math_verify"),
        ("svamp", grade_math, "math_verify"),
        ("bbh", grade_free, "exact_match"),
    ],
)
def test_every_gold_answer_is_right(shared_data, name, grade, metric):
    """Stated plainly, as LaTeX, and at the end of the published solution: all of them."""
    rows = records(shared_data, name)
    ways = {"plain": lambda row: f"The answer is {row['answer']}."}
    if name != "bbh":
        ways["latex"] = lambda row: f"so the answer is ${row['answer']}$."
    if "solution" in rows[0]:
        ways["solution"] = lambda row: row["solution"]
    for way, text in ways.items():
        missed = [row["answer"] for row in rows if not grade(row, [text(row)])[metric]]
        print(f"{name}, {way}: {len(rows) - len(missed)} of {len(rows)} right")
        assert missed == []
        wrong = [row for row in rows[:40] if grade(row, [text({**row, **other(row)})])[metric]]
        assert wrong == []


def other(row):
    """Another answer, in every place that the texts above take it from."""
    answer = {"True": "False", "False": "True", "Yes": "No", "No": "Yes"}.get(
        row["answer"], "(Z)" if row["answer"].startswith("(") else "123456789"
    )
    return {"answer": answer, "solution": f"The answer is {answer}."}


def test_every_gold_span_and_summary_is_right(shared_data):
    for row in records(shared_data, "squad2"):
        said = row["answers"][-1] if row["answers"] else "unanswerable"
        assert grade_span(row, [said]) == {"f1": 1, "exact": 1, "parsed": 1}
    for row in records(shared_data, "xsum")[:40]:
        assert grade_summary(row, [row["summary"]])["rougeL"] == 1


@pytest.mark.parametrize("task", ["math500", "bbh"])
def test_shipped_worked_examples_are_right_and_not_scored(shared_data, task):
    grade = {"math500": grade_math, "bbh": grade_free}[task]
    scored = {row["question"] for row in records(shared_data, task)}
    for one in worked_examples(task, "free", shared_data, None):
        assert one["question"] not in scored
        assert max(grade(one, [one["solution"]]).values()) == 1
        assert grade(one, [one["solution"]])["parsed"] == 1


def test_the_worked_examples_of_bbh_are_those_that_it_publishes(shared_data):
    lines = (shared_data / "fewshot_bbh_cot_prompts.jsonl").read_text("utf-8").splitlines()
    published = {row["subject"]: row["prompt"] for row in map(json.loads, lines)}
    shipped = worked_examples("bbh", "free", None, None)
    assert {one["subject"] for one in shipped} == set(published)
    there = [one["question"] in published[one["subject"]] for one in shipped]
    assert all(there)
