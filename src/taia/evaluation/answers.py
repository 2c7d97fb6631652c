r"""Whether a generated answer is right: read by libraries, compared by libraries.

Mathematics by math-verify (SymPy), words and option letters by math-verify's extraction,
other texts by lm-eval's exact match, spans by the SQuAD functions in lm-eval, summaries by
rouge-score. What is read is what follows the last "answer is" or "####" of the text (a heading
of Markdown is none), else the whole text; of a solution of MATH, failing that, the last \boxed.
An answer that cannot be read is wrong, and `parsed` says so.

Limits: math-verify limits its time by a signal, so outside a process's main thread an
expression may take as long as it likes. F1 and ROUGE stem and tokenise English.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from taia.evaluation.records import ALPHABET

__all__ = [
    "UNANSWERABLE",
    "grade_free",
    "grade_math",
    "grade_span",
    "grade_summary",
    "read_answer",
]

ANCHOR = re.compile(
    r"answer is|(?<!#)####(?!#)[ \t]*(?=\S[^\n]*\s*\Z|[^\sA-Za-z*]\S*[ \t]*\n)", re.IGNORECASE
)
"""What stands before an answer. "####" is GSM8K's, where a value or the end of the text follows;
else it is a heading of Markdown, which chat models write before each step."""

UNANSWERABLE = "unanswerable"
"""What a model is asked to say, and lm-eval's prompt shows, where a passage has no answer."""

WORDS = (("True", "False"), ("Yes", "No"), ("valid", "invalid"))
"""The answers of tasks that have two."""

SECONDS = 5
"""The longest that one expression may take to parse or to compare."""

MATHEMATICS = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
"""What shows math-verify that an expression begins."""

WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
UNSAID = re.compile(r"\\[()\[\]]|[$\"\u201c\u201d]")
"""What LaTeX and quotation put around an option letter or a word."""

Scores = dict[str, float]
"""lm-eval's per-example metrics; `parsed` is 1 where an answer could be read."""


def read_answer(text: str) -> tuple[str, bool]:
    """What follows the last anchor, and True; or the whole text, and False."""
    ends = [found.end() for found in ANCHOR.finditer(text)]
    if not ends:
        return text.strip(), False
    return text[ends[-1] :].lstrip(": ").strip(), True


def grade_math(doc: Mapping[str, Any], responses: Sequence[str]) -> Scores:
    """A number or expression against the record's `answer`, by math-verify."""
    from math_verify import verify

    gold = _expression(f"${doc['answer']}$")
    answer = _read_expression(responses[0], doc["answer"])
    with _quiet():
        right = bool(answer) and verify(gold, answer, timeout_seconds=_seconds())
    return {"math_verify": float(right), "parsed": float(bool(answer))}


def grade_free(doc: Mapping[str, Any], responses: Sequence[str]) -> Scores:
    """An option letter, one of two words, a number, or any other text against `answer`."""
    gold, text = doc["answer"], responses[0]
    if _is_number(gold):
        scores = grade_math(doc, responses)
        return {"exact_match": scores["math_verify"], "parsed": scores["parsed"]}
    strings = _possible(gold, doc["question"])
    if strings:
        answer = _read_string(text, strings)
        return {"exact_match": float(answer == _plain(gold)), "parsed": float(bool(answer))}
    return _same_text(gold, text)


def grade_span(doc: Mapping[str, Any], responses: Sequence[str]) -> Scores:
    """SQuAD v2: the best F1 and exact match over the gold spans; none: it must be refused."""
    from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer

    answer, _ = read_answer(responses[0])
    answer = (answer.splitlines() or [""])[0]
    said = normalize_answer(answer)
    refused = said.startswith(UNANSWERABLE)
    if refused:
        said = ""

    def f1(gold: str) -> float:
        wanted = normalize_answer(gold)
        if not said or not wanted:
            return float(said == wanted)
        return float(f1_abstractive([said], [wanted]))

    golds = doc["answers"] or [""]
    exact = max(float(said == normalize_answer(gold)) for gold in golds)
    parsed = bool(said or refused or (answer and doc["answers"]))  # dots alone refuse nothing
    best = max(f1(gold) for gold in golds)
    return {"f1": best * parsed, "exact": exact * parsed, "parsed": float(parsed)}


def grade_summary(doc: Mapping[str, Any], responses: Sequence[str]) -> Scores:
    """ROUGE-1, -2 and -L F-measures with stemming, as lm-eval's summarisation tasks take them."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scores = RougeScorer(kinds, use_stemmer=True).score(doc["summary"], responses[0])
    parsed = float(bool(responses[0].strip()))
    return {kind: float(scores[kind].fmeasure) for kind in kinds} | {"parsed": parsed}


def _read_expression(text: str, gold: str) -> list[Any]:
    """What math-verify reads of an answer; bare LaTeX is shown to it as LaTeX."""
    answer, anchored = read_answer(text)
    line = (answer.splitlines() or [""])[0].strip().rstrip(". ")
    bare = anchored and line and not MATHEMATICS.search(answer)
    if bare and ("\\" in line or not _is_number(gold)):
        found = _expression(f"${line}$")
        if found:
            return found
    found = _expression(f"The answer is {answer}" if anchored else answer)
    return found if found or "\\boxed" not in text else _expression(text)


def _expression(text: str) -> list[Any]:
    from math_verify import parse

    with _quiet():
        found: list[Any] = parse(text.replace("\u2212", "-"), parsing_timeout=_seconds())
    return found


def _possible(gold: str, question: str) -> tuple[str, ...]:
    """The answers that a question with such a gold answer can have; none where any text can be."""
    if len(gold) == 3 and gold[0] == "(" and gold[2] == ")" and gold[1] in ALPHABET:
        letters = [one for one in ALPHABET if f"({one})" in question or one == gold[1]]
        return (*(f"({one})" for one in letters), *(f"{one})" for one in letters), *letters)
    for pair in WORDS:
        if gold.lower() in {word.lower() for word in pair}:
            return (*pair, *(word.lower() for word in pair), *(word.title() for word in pair))
    return ()


def _read_string(text: str, strings: tuple[str, ...]) -> str:
    from math_verify import StringExtractionConfig, parse

    answer, anchored = read_answer(text)
    shown = WRAPPED.sub(r"\1", WRAPPED.sub(r"\1", UNSAID.sub("", answer))).strip()
    shown = f"The answer is {shown}" if anchored else shown
    config = StringExtractionConfig(strings=tuple(dict.fromkeys(strings)))
    with _quiet():
        found = parse(shown, [config], parsing_timeout=_seconds())
    return _plain(str(found[0])) if found else ""


def _same_text(gold: str, text: str) -> Scores:
    """lm-eval's exact match, with what its BIG-Bench Hard tasks ignore; an anchor is needed."""
    from lm_eval.api.metrics import exact_match_fn

    answer, anchored = read_answer(text)
    line = (answer.splitlines() or [""])[0].strip()
    if not re.search("[*`]", gold):  # bold or code of Markdown
        line = re.sub("[*`]", "", line).strip()
    if not anchored or not line:
        return {"exact_match": 0.0, "parsed": 0.0}
    same = exact_match_fn(
        predictions=[line],
        references=[gold],
        ignore_case=True,
        regexes_to_ignore=[r"\.$", ",", r"\\", "\n", '"'],
    )
    return {"exact_match": float(same["exact_match"]), "parsed": 1.0}


def _plain(text: str) -> str:
    return text.lower().strip("() ")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _seconds() -> int | None:
    """math-verify's time limit, which needs the main thread."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without math-verify's log: a text that cannot be read is a count, not a warning."""
    loggers = [logging.getLogger(name) for name in ("math_verify", "latex2sympy2_extended")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
