"""LoRACL: which of the two models answers, prompt by prompt, and with the very scores it has."""

from __future__ import annotations

import functools
import json
import random

import pytest

from taia.errors import EvaluationError
from taia.evaluation.loracl import LORACL, choosing, prompt_losses
from taia.evaluation.variants import parse_variants


@pytest.fixture(scope="module")
def live(adapters):
    """A tiny model with an adapter on it."""
    from taia.attach import attach
    from taia.load import load_model

    base, adapter = adapters("llama", "plain")
    return attach(load_model(base, dtype="float32"), adapter)


def requests(seed, count):
    """Prompts of random tokens, three choices each, as lm-eval asks them."""
    pick = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [pick.randrange(3, 64) for _ in range(pick.randint(2, 12))]
        choices = [[pick.randrange(3, 64) for _ in range(pick.randint(1, 3))] for _ in range(3)]
        made += [(("", ""), prompt, choice) for choice in choices]
    return made


def loss(model, prompt):
    """transformers' own loss of one prompt."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_prompt_losses_are_those_of_each_prompt_alone(live, monkeypatch):
    from taia.evaluation import loracl

    prompts = [request[1] for request in requests(0, 6)] + [[5]]
    for room in (1, 1000, 2**27):  # one at a time, some, all
        monkeypatch.setattr(loracl, "LOGITS", room)
        found = prompt_losses(live.model, prompts, live.model.device)
        assert found[:-1] == pytest.approx([loss(live.model, p) for p in prompts[:-1]], abs=1e-5)
        assert found[-1] == 0.0


def test_each_prompt_is_answered_by_the_model_that_likes_it_better(live):
    from chat_tools import byte_tokenizer

    from taia.evaluation.engine import wrap

    asked, told = requests(1, 16), []
    plain = wrap(live.model, byte_tokenizer(), 8)
    chosen = wrap(live.model, byte_tokenizer(), 8, functools.partial(choosing, live.using))
    chosen.on_answers = lambda part: told.extend(part)
    answers, losses = {}, {}
    for keep in ("none", "all"):
        with live.using(keep):
            answers[keep] = plain._loglikelihood_tokens(asked)
            losses[keep] = [loss(live.model, request[1]) for request in asked]
    picks = [
        "all" if after < before else "none"
        for before, after in zip(losses["none"], losses["all"], strict=True)
    ]
    assert set(picks) == {"none", "all"}
    found = chosen._loglikelihood_tokens(asked)
    for index, (value, greedy) in enumerate(found):
        expected = answers[picks[index]][index]
        assert value == pytest.approx(expected[0], abs=1e-5)
        assert greedy == expected[1]
    assert sorted(told) == list(range(len(asked)))


def test_an_adapter_that_does_nothing_leaves_every_prompt_to_the_base(live):
    from chat_tools import byte_tokenizer

    from taia.evaluation.engine import wrap

    def nothing(_keep):
        return live.using("none")

    lm = wrap(live.model, byte_tokenizer(), 8, functools.partial(choosing, nothing))
    assert not any(lm.tuned([prompt for _, prompt, _ in requests(2, 4)]))


def test_the_name_is_its_own():
    assert parse_variants(["base", LORACL])[1].selection == LORACL
    with pytest.raises(EvaluationError, match="a variant of its own"):
        parse_variants(["loracl=attention"])


def test_loracl_stands_next_to_the_others(tmp_path):
    from adapter_tools import save_adapter
    from chat_tools import tiny_chat_model

    from taia.evaluation.harness import evaluate
    from taia.evaluation.result import mending_command, read_results

    base = tiny_chat_model(tmp_path / "base", "float32")
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)
    rows = [{"id": str(n), "question": f"{n}?", "choices": ["a", "bc"], "answer": 0}
            for n in range(5)]  # fmt: skip
    (tmp_path / "csqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tasks": ["csqa"], "data": tmp_path, "dtype": "float32"}
    names = ["base", "vanilla", "taia", LORACL]
    evaluate(base, tmp_path / "out", adapter=adapter, variants=names, **options)
    results = read_results(tmp_path / "out")
    for index, example in enumerate(results.examples[LORACL, "csqa"]):
        either = [results.examples[name, "csqa"][index] for name in ("base", "vanilla")]
        assert any(example.loglikelihoods == pytest.approx(one.loglikelihoods) for one in either)
    assert "base,vanilla,taia,loracl" in mending_command(results.settings, tmp_path / "out")
    with pytest.raises(EvaluationError, match="nothing to switch"):
        evaluate(base, tmp_path / "two", tuned=base, variants=names, **options)
