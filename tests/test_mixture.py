"""Mixtures: what may be stated, the laws of the order, repeats told beforehand, exact resume."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_tools import byte_tokenizer, tiny_chat_model
from hypothesis import given, settings
from hypothesis import strategies as st

from taia.errors import DataError, RecipeError
from taia.recipe import load_data, place_data
from taia.training.corpus import make_corpus, read_data
from taia.training.mixture import SCHEDULES, Mixture, Source, parse_data
from taia.training.preview import preview
from taia.training.schedule import curves_of, due, mixed_order, turns
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("a", 30), ("b", 20), ("c", 4)):
        write(folder / f"{name}.jsonl", count)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"))


def stated(place, schedule="uniform", **more):
    return place_data({"sources": TWO, "schedule": schedule, "size": 40, **more}, place)


def corpus_of(data, **more):
    options = {"base": "base", "batch_size": 4, "max_length": 64} | more
    stated = Settings(data=data, **options)
    return make_corpus(stated, read_data(stated), byte_tokenizer())


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


@given(mixtures())
def test_the_plain_form_reads_back(mixture):
    assert Mixture.parse(json.loads(json.dumps(mixture.plain()))) == mixture
    assert parse_data(mixture.plain()) == mixture.plain()


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


@pytest.fixture
def old_signals():
    """The command line takes signals for its own process; this one is not its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("old_signals")
def test_a_dry_run_tells_all_and_writes_nothing(place, base, tmp_path, capsys, monkeypatch):
    from taia.cli.app import main

    monkeypatch.chdir(tmp_path)
    mixture = {"sources": TWO, "schedule": "staged", "held_out": "held.jsonl"}
    (place / "mix.yaml").write_text(json.dumps(mixture))
    (place / "held.jsonl").write_text('{"question": "A 3?", "choices": ["x", "y"], "answer": 0}\n')
    words = ["train", "--base", str(base), "--data", str(place / "mix.yaml")]
    words += ["--dry-run", "--batch-size", "4", "--max-length", "45"]
    monkeypatch.setattr(sys, "argv", ["taia", *words, "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    told = json.loads(capsys.readouterr().out)
    assert [part["used"] for part in told["sources"]] == [30, 20]
    assert told["steps"] == 13
    assert told["sources"][0]["truncated"] > 0
    assert told["sources"][0]["exact"] == 1
    assert told["shares"][0] == {"share_a": 1.0, "share_b": 0.0}
    monkeypatch.setattr(sys, "argv", ["taia", *words])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    text = capsys.readouterr().out
    assert "a.jsonl:4 with held.jsonl" in text
    assert "13 steps of 4: 50 examples" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_one_file(place, base):
    told = preview(base, place / "a.jsonl", batch_size=4, max_length=64, epochs=2)
    assert (told.steps, told.examples, told.shares) == (15, 60, ())
    assert told.parts[0].repeats == 2
    with pytest.raises(RecipeError, match="rank"):
        preview(base, place / "a.jsonl", rank=0)


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


class StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [*SCHEDULES, "curve"])
def test_resume_gives_the_same_bits(schedule, place, base, tmp_path):
    import torch
    from safetensors.torch import load_file

    from taia.training.callbacks import read_log
    from taia.training.finetune import finetune

    data = stated(place, schedule) if schedule != "curve" else place_data([
        {"from": "a.jsonl", "share": {0: 0.2, 0.5: 1, 1: 0.9}},
        {"from": "b.jsonl", "share": {0: 0.8, 0.5: 0, 1: 0.1}},
    ], place)  # fmt: skip
    whole = finetune(base, data, tmp_path / "whole", save_steps=2, **FAST)
    at = random.Random(schedule).randint(2, whole.steps - 1)

    def stop(line):
        if line["step"] == at:
            raise StopError

    with pytest.raises(StopError):
        finetune(base, data, tmp_path / "cut", save_steps=2, on_progress=stop, **FAST)
    cut = finetune(base, data, tmp_path / "cut", save_steps=2, resume=True, **FAST)
    one, two = (load_file(run.out / "adapter_model.safetensors") for run in (whole, cut))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [read_log(run.out / "log.jsonl") for run in (whole, cut)]
    kept = ("step", "loss", "tokens", "epoch", "share_a", "share_b")
    assert [[line[k] for k in kept] for line in logs[0]] == [
        [line[k] for k in kept] for line in logs[1]
    ]
    with pytest.raises(RecipeError, match="data"):
        finetune(base, stated(place, size=36), cut.out, resume=True, **FAST)


def test_a_dry_run_of_a_recipe(place, base):
    from taia.experiment import preview_recipe

    recipe = {
        "name": "one",
        "base": str(base),
        "train": {"data": {"sources": TWO, "size": 40}, "batch_size": 4},
        "evaluate": {"tasks": ["facts"]},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    told = preview_recipe(place / "recipe.yaml")
    assert [part.used for part in told.parts] == [24, 16]
    recipe["train"]["data"]["sources"] = [{"from": "a.jsonl", "share": 0.5}]
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=r"train\.data: the shares sum to 0\.5"):
        preview_recipe(place / "recipe.yaml")
