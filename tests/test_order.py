"""The order of training: the laws of schedules, the same for any workers and processes."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_tools import tiny_chat_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_tools import FAST, TWO, mixtures, shares, stated, three_sources

from taia.training.corpus import make_corpus, read_data
from taia.training.mixture import SCHEDULES, Mixture, Source
from taia.training.schedule import curves_of, due, mixed_order, turns
from taia.training.settings import Settings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return three_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"))


@settings(deadline=None)
@given(mixtures(), st.integers(1, 200))
def test_every_prefix_is_within_one_example_of_its_due(mixture, total):
    curves = curves_of(mixture, [1] * len(mixture.sources))
    chosen = np.array(turns(curves, total))
    progress = np.arange(total + 1) / total
    for at, curve in enumerate(curves):
        had = np.concatenate([[0], np.cumsum(chosen == at)])
        assert np.abs(had - total * due(curve, progress)).max() < 1 + 1e-6


@given(shares.filter(lambda weights: len(weights) > 1), st.sampled_from(SCHEDULES))
def test_a_schedule_says_when_and_not_how_much(weights, schedule):
    parts = [weight / sum(weights) for weight in weights]
    sources = tuple(Source(f"s{at}", "x", part, at == 0) for at, part in enumerate(parts))
    curves = curves_of(Mixture(sources, schedule), [1] * len(parts))
    areas = [due(curve, np.ones(1)).item() for curve in curves]
    assert np.allclose(areas, parts)


@settings(deadline=None, max_examples=50)
@given(
    mixtures(),
    st.integers(1, 7),
    st.integers(1, 150),
    st.lists(st.integers(1, 30), min_size=5, max_size=5),
    st.integers(0, 3),
)
def test_the_laws_of_the_order(mixture, batch, total, counts, seed):
    counts = counts[: len(mixture.sources)]
    generator = random.Random(seed)
    lengths = [[generator.randint(1, 90) for _ in range(count)] for count in counts]
    names = [one.name for one in mixture.sources]
    curves = curves_of(mixture, counts)
    order = mixed_order(lengths, names, curves, batch, total, seed)
    assert order == mixed_order(lengths, names, curves, batch, total, seed)
    assert len(order) == total
    owner = [at for at, count in enumerate(counts) for _ in range(count)]
    used, starts = Counter(order), [0, *itertools.accumulate(counts)]
    progress = np.arange(total + 1) / total
    for at, curve in enumerate(curves):
        own = [used.get(n, 0) for n in range(starts[at], starts[at + 1])]
        assert max(own) - min(own) <= 1  # once before any comes again
        had = np.concatenate([[0], np.cumsum([owner[n] == at for n in order])])
        off = np.abs(had - total * due(curve, progress))
        assert off.max() <= batch + 1e-6
        assert off[::batch].max() < 1 + 1e-6


def test_another_seed_is_another_order_and_like_lengths_meet():
    lengths = [[n % 100 + 1 for n in range(400)], [n % 40 + 1 for n in range(400)]]
    curves = curves_of(Mixture.parse(TWO), [1, 1])
    order = mixed_order(lengths, "ab", curves, 8, 600, 0)
    assert order != mixed_order(lengths, "ab", curves, 8, 600, 1)
    flat = lengths[0] + lengths[1]
    padded = sum(8 * max(flat[n] for n in order[at : at + 8]) for at in range(0, 600, 8))
    shuffled = order[:]
    random.Random(0).shuffle(shuffled)
    blind = sum(8 * max(flat[n] for n in shuffled[at : at + 8]) for at in range(0, 600, 8))
    assert padded < 0.8 * blind


def test_annealed_falls_and_rising_is_its_mirror():
    def ends(schedule, share):
        sources = (Source("a", "x", 1 - share), Source("b", "x", share, ood=True))
        curve = curves_of(Mixture(sources, schedule), [1, 1])[1]
        return [value for _, value in curve]

    assert ends("annealed", 0.25) == [0.5, 0.0]
    assert ends("annealed", 0.75) == [1.0, 0.5]
    assert ends("rising", 0.25) == [0.0, 0.5]
    assert ends("annealed", 0.0) == [0.0, 0.0]
    assert ends("annealed", 1.0) == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 4])
def test_the_order_is_the_same_for_any_number_of_workers(workers, place, base, tmp_path):
    from taia.load import load_tokenizer
    from taia.sources import resolve
    from taia.training.loop import make_trainer
    from taia.training.ready import make_ready

    options = Settings(base=str(base), data=stated(place, "annealed"), **FAST)
    tokenizer = load_tokenizer(base)
    corpus, made = (
        make_corpus(options, read_data(options), tokenizer),
        make_ready(options, resolve(base).form, tokenizer),
    )
    seen = []
    for count in (0, workers):
        trainer = make_trainer(
            made.model, [corpus.examples[n] for n in corpus.order], options, tmp_path,
            padding=0, save_steps=9, additions=made.additions,
        )  # fmt: skip
        trainer.args.dataloader_num_workers = count
        seen.append([batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()])
    assert len(seen[0]) == 10
    assert seen[0] == seen[1]


WORKER = """
import json, os, sys
from pathlib import Path
from taia.load import load_tokenizer
from taia.sources import resolve
from taia.training.corpus import make_corpus, read_data
from taia.training.loop import make_trainer
from taia.training.ready import make_ready
from taia.training.settings import Settings

options, out = json.loads(sys.argv[1]), sys.argv[2]
stated = Settings(**options)
tokenizer = load_tokenizer(options["base"])
corpus = make_corpus(stated, read_data(stated), tokenizer)
made = make_ready(stated, resolve(options["base"]).form, tokenizer)
trainer = make_trainer(
    made.model, [corpus.examples[n] for n in corpus.order], stated, Path(out),
    padding=256, save_steps=9, additions=made.additions,
)
seen = [
    [[token for token, real in zip(ids, mask) if real] for ids, mask in zip(*rows)]
    for batch in trainer.get_train_dataloader()
    for rows in [(batch["input_ids"].tolist(), batch["attention_mask"].tolist())]
]
with open(out + "-" + os.environ.get("RANK", "0"), "w") as file:
    json.dump([seen, [corpus.examples[n]["input_ids"] for n in corpus.order]], file)
"""


@pytest.mark.slow
def test_two_processes_share_out_the_same_batches(place, base, tmp_path):
    options = FAST | {"base": str(base), "data": stated(place, "annealed")}
    (tmp_path / "worker.py").write_text(WORKER)
    config = Path(__file__).parents[1] / "recipes" / "accelerate" / "ddp.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", config]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    words = [*launch, tmp_path / "worker.py", json.dumps(options), tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"out-{rank}").read_text()) for rank in (0, 1)]
    (first, order), (second, same) = told
    assert order == same
    assert len(first) == len(second) == 10
    for step, parts in enumerate(zip(first, second, strict=True)):
        rows = [row for part in parts for row in part]
        assert sorted(rows) == sorted(order[4 * step : 4 * step + 4])
