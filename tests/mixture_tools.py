"""What the tests of mixtures share: three small sources, and mixtures of any kind."""

from __future__ import annotations

import json

from chat_tools import byte_tokenizer
from hypothesis import strategies as st

from taia.recipe import place_data
from taia.training.corpus import make_corpus, read_data
from taia.training.mixture import SCHEDULES, Mixture
from taia.training.settings import Settings

FAST = {"batch_size": 4, "learning_rate": 1e-2, "rank": 2, "max_length": 64}
TWO = [{"from": "a.jsonl", "share": 0.6}, {"from": "b.jsonl", "share": 0.4, "ood": True}]


def write(path, count, words=1):
    rows = [
        {"instruction": f"{path.stem} {n}?", "output": "yes " * (n % 5 + words)}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def three_sources(folder):
    """The folder with a.jsonl, b.jsonl and c.jsonl, of 30, 20 and 4 examples."""
    for name, count in (("a", 30), ("b", 20), ("c", 4)):
        write(folder / f"{name}.jsonl", count)
    return folder


def stated(place, schedule="uniform", **more):
    return place_data({"sources": TWO, "schedule": schedule, "size": 40, **more}, place)


def corpus_of(data, **more):
    options = {"base": "base", "batch_size": 4, "max_length": 64} | more
    stated = Settings(data=data, **options)
    return make_corpus(stated, read_data(stated), byte_tokenizer())


shares = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@st.composite
def mixtures(draw):
    """A mixture with any schedule, or with curves of its own."""
    weights = draw(shares)
    if len(weights) > 1 and draw(st.booleans()):
        places = sorted({0.0, *draw(st.lists(st.integers(1, 9), max_size=3)), 10.0})
        rows = [draw(st.permutations(weights)) for _ in places]
        sources = [
            {"name": f"s{at}", "from": "x", "share": [
                [p / 10, row[at] / sum(weights)] for p, row in zip(places, rows, strict=True)]}
            for at in range(len(weights))
        ]  # fmt: skip
        return Mixture.parse(sources)
    schedule = draw(st.sampled_from(SCHEDULES if len(weights) > 1 else ("uniform", "staged")))
    sources = [
        {"name": f"s{at}", "from": "x", "share": w / sum(weights), "ood": at == 0}
        for at, w in enumerate(weights)
    ]
    return Mixture.parse({"sources": sources, "schedule": schedule})
