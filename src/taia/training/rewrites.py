"""What the base is asked when it rewrites an answer, and which of its rewrites are taken.

Template and selection are those of Self-Distillation Fine-Tuning (Yang et al. 2024, arXiv
2402.13669, and its code): the base sees the question and the answer of the data as a
reference. A rewrite is kept from training, and the answer of the data trained on instead, if

    truncated       it did not come to an end within its tokens, or its prompt has no room
    empty           it has no words
    echo            it speaks of its prompt ("reference answer", "my response", ...)
    answer lost     the reference states a final answer (#### 26; the answer is B. IRON) and the
                    rewrite does not state the same one (where it marks one itself: there)

Limits: a final answer is looked for only where the reference marks it in one of these two ways;
a rewrite may be wrong in all else. A letter counts where it stands as a letter of a choice does,
unless other words than the reference's come after it.
"""

from __future__ import annotations

import re

__all__ = ["KEPT", "TEMPLATE", "final_answer", "judge", "states"]

TEMPLATE = (
    "Below are an instruction that describes a task along with a reference answer. Using the "
    "reference answer as a guide, write your own response.\n\n"
    "### Instruction:\n{question}\n\n### Reference Answer:\n{answer}\n\n### Response:"
)

KEPT = ("truncated", "empty", "echo", "answer lost")
"""Why an answer of the data is trained on in place of its rewrite."""

ECHOES = (
    "reference answer", "your response", "my response", "your own response",
    "now it's your turn",
)  # fmt: skip

FINAL = re.compile(r"####[ \t]*(\S.*)|\banswer is:?[ \t]*(\S.*)", re.IGNORECASE)
CHOICE = re.compile(r"\(?([A-Z])(?:[.):]+\s*(.*))?")


def judge(reference: str, rewrite: str, *, finished: bool) -> str | None:
    """Why the rewrite is not taken (one of KEPT), or None if it is."""
    if not finished:
        return "truncated"
    if not rewrite.strip():
        return "empty"
    lowered = rewrite.casefold()
    if any(echo in lowered for echo in ECHOES) or rewrite.lstrip().startswith("Your turn"):
        return "echo"
    answer = final_answer(reference)
    if answer is not None and not states(_conclusion(rewrite), answer):
        return "answer lost"
    return None


def final_answer(text: str) -> str | None:
    """The last final answer that a text marks, or None."""
    found = list(FINAL.finditer(text))
    if not found:
        return None
    return (found[-1][1] or found[-1][2]).strip().rstrip(".").strip() or None


def _conclusion(text: str) -> str:
    """A text from its last marked final answer on; all of it where it marks none."""
    found = list(FINAL.finditer(text))
    return text[found[-1].start() :] if found else text


def states(text: str, answer: str) -> bool:
    """Whether a text states an answer: its words, or its letter where it is a choice's."""
    choice = CHOICE.fullmatch(answer)
    if choice is None:
        return _holds(text, answer)
    letter, words = choice[1], (choice[2] or "").strip()
    if len(words) > 1:
        if _holds(text, words):
            return True
        letter += r"(?![.):]+\s+\S)"  # with other words after it, it is another answer
    named = rf"(?i:\b(?:answer|option|choice|letter)\b(?: is)?:?)\W{{0,4}}{letter}(?!\w)"
    stands = rf"(?:^|\s|\*)\(?{letter}[.):]|\({letter}\)"
    return bool(re.search(named, text) or re.search(stands, text)) or text.strip() == choice[1]


def _holds(text: str, words: str) -> bool:
    """Whether words stand in a text; neither case, spaces nor the commas of numbers count."""
    plain, wanted = _plain(text), _plain(words)
    return re.search(rf"(?<![\w.-]){re.escape(wanted)}(?!\w|\.\d)", plain) is not None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", text).casefold().split())
