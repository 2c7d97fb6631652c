"""How far the training text is from the text of the questions, as word frequencies.

The measure is the Jensen-Shannon distance of scipy (base 2: 0 the same words as often, 1 no word
in common) between equally many words of both. Two samples of one text are not at 0 either, so the
yardstick stands beside it: the distance between two halves of the questions themselves.

Limits: single words say nothing of form, and a number of words is taken at random with a fixed
seed. Texts are read from local files only; nothing is fetched for it. It decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taia.errors import TaiaError
from taia.evaluation.result import Results
from taia.files import read_json

__all__ = ["Mismatch", "mismatches", "word_distance"]

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")
"""A word, or one character of a script that is written without spaces."""

MOST_WORDS = 20_000
FEWEST_WORDS = 100
"""Below so many words on a side, nothing is measured."""

NOT_TEXT = ("id", "subject")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Of one task: distance of training and questions, and of two halves of the questions."""

    task: str
    distance: float
    yardstick: float
    words: int


def mismatches(results: Results) -> tuple[tuple[Mismatch, ...], str]:
    """The distance for every task whose text can be read, and why there is none, or nothing."""
    try:
        trained = _training_words(results)
    except (TaiaError, OSError, KeyError, TypeError, ValueError) as error:
        return (), f"the training text cannot be read: {str(error).splitlines()[0]}"
    found = []
    for task, info in results.settings.tasks.items():
        file = Path(info.source)
        if info.sha256 is not None and file.is_file():
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() == info.sha256:  # else they are other questions
                made = word_distance(task, trained, _question_words(content))
                found += [made] if made else []
    if not found:
        return (), "the questions are not in local files, were changed since, or hold few words"
    return tuple(found), ""


def word_distance(
    task: str, trained: Sequence[Sequence[str]], asked: Sequence[Sequence[str]]
) -> Mismatch | None:
    """Of texts as lists of words; None where there are too few."""
    from scipy.spatial.distance import jensenshannon

    random = np.random.default_rng(0)
    questions = [asked[at] for at in random.permutation(len(asked))]
    halves = [_joined(questions[0::2]), _joined(questions[1::2])]
    training = _joined(trained[at] for at in random.permutation(len(trained)))
    count = min(MOST_WORDS, len(training), *(len(half) for half in halves))
    if count < FEWEST_WORDS:
        return None
    samples = [Counter(words[:count]) for words in (*halves, training)]
    vocabulary = sorted(set().union(*samples))
    one, other, train = (np.array([sample[word] for word in vocabulary]) for sample in samples)
    distance = (jensenshannon(train, one, base=2) + jensenshannon(train, other, base=2)) / 2
    return Mismatch(task, float(distance), float(jensenshannon(one, other, base=2)), count)


def _joined(texts: Iterable[Sequence[str]]) -> list[str]:
    """The words of texts one after another, as many as are ever looked at."""
    words: list[str] = []
    for text in texts:
        words += text
        if len(words) >= MOST_WORDS:
            break
    return words


def _training_words(results: Results) -> list[list[str]]:
    """The words of every training example. Raises for files that are not there."""
    from taia.training.data import read_chats
    from taia.training.mixture import Mixture

    places = [results.folder / "train"]
    if results.settings.tuned is not None:
        places.append(Path(results.settings.tuned))
    folder = next((one for one in places if (one / "train.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError("no train.json beside the fine-tune says what it was trained on")
    stated: dict[str, Any] = read_json(folder / "train.json")["settings"]
    data = stated["data"]
    if isinstance(data, str):
        sources = [(data, stated.get("max_examples"))]
    else:
        sources = [(one.path, one.max_examples) for one in Mixture.parse(data).sources]
    absent = [path for path, _ in sources if not Path(path).exists()]
    if absent:
        raise FileNotFoundError(f"{', '.join(absent)}: not there from this folder")
    return [
        [word for turn in chat.messages for word in _words(turn.content)]
        for path, most in sources
        for chat in read_chats(path, max_examples=most)
    ]


def _question_words(content: bytes) -> list[list[str]]:
    records = [json.loads(line) for line in content.splitlines() if line.strip()]
    return [[word for text in _texts(record) for word in _words(text)] for record in records]


def _texts(record: dict[str, Any]) -> list[str]:
    return [
        text
        for field, value in record.items()
        if field not in NOT_TEXT
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    ]


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())
