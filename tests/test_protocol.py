"""Protocols: lm-eval's prompts against lm-eval's own tasks, the two stages, shots, other tasks."""

from __future__ import annotations

import json

import pytest
from chat_tools import tiny_chat_model

from taia.errors import EvaluationError, RecipeError
from taia.evaluation.catalogue import find_tasks, load_task
from taia.evaluation.foreign import foreign_file
from taia.evaluation.harness import evaluate
from taia.evaluation.hub import from_hub
from taia.evaluation.protocol import check_protocol, in_stages
from taia.evaluation.result import read_results

LABELLED = {"text": ["ash", "bone", "clay"], "label": ["A", "B", "C"]}
HUB = {
    ("arc_easy", "arc_easy"): {
        "id": "M_1", "question": "What burns?", "choices": LABELLED, "answerKey": "C"
    },
    ("piqa", "piqa"): {"goal": "burn it", "sol1": "do", "sol2": "do not", "label": 1},
    ("mmlu", "mmlu_high_school_physics"): {
        "question": "What burns?", "subject": "high_school_physics",
        "choices": ["a", "b", "c", "d"], "answer": 2,
    },
    ("ceval", "ceval-valid_law"): {
        "id": 3, "question": "何者？", "A": "甲", "B": "乙", "C": "丙", "D": "丁",
        "answer": "C", "subject": "law",
    },
    ("logiqa", "logiqa"): {
        "label": "c", "context": "All burns.", "question": "What burns?",
        "options": ["it", "all", "wax", "ice"],
    },
    ("hellaswag", "hellaswag"): {
        "ctx_a": "A man sits. [title] He waits.", "ctx_b": "he", "label": "2",
        "endings": ["[step] stands.", "burns.", "waits."], "activity_label": "Waiting",
    },
    ("pubmedqa", "pubmedqa"): {
        "QUESTION": "Does it burn?", "CONTEXTS": ["It may.", "It did."], "final_decision": "no"
    },
    ("math500", "minerva_math500"): {
        "problem": "$1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2",
        "subject": "Algebra", "unique_id": "t/1.json",
    },
    ("gsm8k", "gsm8k"): {"question": "1 and 1?", "answer": "<<1+1=2>>\n#### 2"},
    ("bbh", "bbh_cot_zeroshot_navigate"): {
        "input": "Turn. Is it?", "target": "No", "subject": "navigate"
    },
}  # fmt: skip
"""One published record a task, with lm-eval's name of the task."""


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), sorted(HUB))
def test_prompts_are_those_of_lm_evals_own_tasks(tmp_path, ours, theirs):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    row = HUB[ours, theirs]
    config = load_yaml(foreign_file(theirs))
    for key in ("tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    rows = Dataset.from_list([{**row, "gold": 2}] if ours == "hellaswag" else [row])
    splits = dict.fromkeys(("train", "validation", "val", "test", "dev"), rows)
    peer = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits})
    shape = "free" if ours in {"math500", "gsm8k", "bbh"} else "choice"
    write(tmp_path / f"{ours}.jsonl", *from_hub(ours, [row], shape))
    task = load_task(find_tasks([ours], tmp_path)[0], protocol="plain")
    doc, other = task.eval_docs[0], peer.eval_docs[0]
    assert task.fewshot_context(doc, 0) == peer.fewshot_context(other, 0)
    assert task.config.target_delimiter == peer.config.target_delimiter
    if ours == "logiqa":  # lm-eval shows the letters and scores the texts; here the letters
        assert task.doc_to_choice(doc) == ["A", "B", "C", "D"]
    elif shape == "choice":
        assert task.doc_to_choice(doc) == peer.doc_to_choice(other)
    else:
        stops = task.config.generation_kwargs["until"]
        assert stops == peer.config.generation_kwargs["until"]


def test_squad_is_asked_as_lm_eval_asks_it(tmp_path):
    from lm_eval.tasks.squadv2.task import SQuAD2

    row = {"id": "5", "title": "Ice age", "context": "It was cold.", "question": "How?"}
    for answers in (["cold"], []):
        row["answers"] = {"text": answers, "answer_start": [0] * len(answers)}
        write(tmp_path / "squad2.jsonl", *from_hub("squad2", [row], "reading"))
        task = load_task(find_tasks(["squad2"], tmp_path)[0], protocol="plain")
        doc = task.eval_docs[0]
        assert task.doc_to_text(doc) == SQuAD2.doc_to_text(None, row)
        assert " " + task.doc_to_target(doc) == SQuAD2.doc_to_target(None, row)


def request(prompt, **arguments):
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, (prompt, {"until": ["Q:"], **arguments}), 0)


def test_the_second_stage_reads_the_models_own_text():
    asked = []

    def generate(requests):
        asked.append([one.args for one in requests])
        return [f" said {index}{'.' * index} " for index in range(len(requests))]

    two = {"lead_in": "The answer is", "answer_toks": 9, "max_gen_toks": 99}
    texts = in_stages(generate, [request("a", **two), request("b"), request("c", **two)])
    assert texts == [
        " said 0. The answer is said 0 ",
        " said 1. ",
        " said 2.. The answer is said 1. ",
    ]
    first, second = asked
    assert [prompt for prompt, _ in first] == ["a", "b", "c"]
    assert first[0][1] == {"until": ["Q:"], "max_gen_toks": 99}
    assert [prompt for prompt, _ in second] == [
        "a said 0. The answer is", "c said 2.. The answer is"
    ]  # fmt: skip
    assert second[0][1] == {"until": ["Q:", "\n"], "max_gen_toks": 9}
    assert in_stages(lambda requests: ["" for _ in requests], [request("a", **two)]) == [
        "The answer is"
    ]


def test_protocols_and_shots_that_there_are():
    assert [check_protocol(name, 4) for name in ("chat", "plain", "paper")] == [[], [], []]
    assert len(check_protocol("papper", 5)) == 2
    assert "from 0 to 4" in check_protocol("chat", -1)[0]


MMLU = [
    {"id": f"{subject}{n}", "question": f"{subject} {n}?", "choices": ["a", "b"], "answer": n % 2,
     "subject": subject}
    for subject in ("law", "art") for n in range(6)
]  # fmt: skip


@pytest.mark.parametrize("protocol", ["chat", "paper"])
def test_shots_are_of_the_subject_and_never_scored(tmp_path, protocol):
    write(tmp_path / "eval_mmlu.jsonl", *MMLU[2:6], *MMLU[8:])
    write(tmp_path / "fewshot_mmlu_dev.jsonl", *MMLU[:3], *MMLU[6:9])  # two stand in both
    task = load_task(find_tasks(["mmlu"], tmp_path)[0], protocol=protocol, shots=2)
    for doc in task.eval_docs:
        shots = task.shots(doc, 2)
        assert [one["subject"] for one in shots] == [doc["subject"]] * 2
        assert doc["question"] not in [one["question"] for one in shots]
        prompt = task.fewshot_context(doc, 2)
        assert prompt.count("?") == 3
        assert prompt.count(doc["question"]) == 1
    with pytest.raises(EvaluationError, match="3 few-shot examples are asked for; there are 2"):
        task.shots(task.eval_docs[0], 3)


def test_few_shot_examples_that_are_not_there(tmp_path):
    write(tmp_path / "svamp.jsonl", {"id": "1", "question": "1 and 1?", "answer": "2"})
    with pytest.raises(EvaluationError, match=r"fewshot_svamp\.jsonl.*ask for 0 shots"):
        load_task(find_tasks(["svamp"], tmp_path)[0], shots=1)


FOREIGN = """
task: one_of_lm_evals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
filter_list:
  - name: first
    filter: [{{function: regex, regex_pattern: "(nothing so)"}}, {{function: take_first}}]
  - name: second
    filter: [{{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_any_other_task_of_lm_evals(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "rows.jsonl", {"q": "one", "a": "1"}, {"q": "two", "a": "2"})
    file = tmp_path / "own.yaml"
    file.write_text(FOREIGN.format(data=tmp_path / "rows.jsonl"))
    tiny_chat_model(tmp_path / "base", "float32")
    options = {"tasks": [f"lm_eval:{file}"], "variants": ["base"], "dtype": "float32"}
    evaluate(tmp_path / "base", tmp_path / "run", **options)
    results = read_results(tmp_path / "run")
    for one in results.examples["base", "own"]:
        assert (one.metric, one.correct, one.parsed) == ("exact_match", 0.0, False)
    assert [one.target for one in results.examples["base", "own"]] == ["1", "2"]
    (tmp_path / "run" / "results" / "base" / "own.jsonl").unlink()
    evaluate(tmp_path / "base", tmp_path / "run", **options)  # found again, and not twice
    assert read_results(tmp_path / "run").examples == results.examples
    with pytest.raises(EvaluationError, match="lm-eval's own task"):
        evaluate(tmp_path / "base", tmp_path / "other", protocol="paper", **options)
    assert not (tmp_path / "other").exists()


def test_tasks_of_lm_evals_are_found_by_name():
    (found,) = find_tasks(["lm_eval:arc_easy"])
    assert (found.name, found.source) == ("arc_easy", "lm_eval:arc_easy")
    with pytest.raises(EvaluationError) as caught:
        find_tasks(["lm_eval:no_such_task", "lm_eval:mmlu"])
    assert "lm-eval has no such task" in caught.value.faults[0]
    assert "a group of lm-eval" in caught.value.faults[1]


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(EvaluationError, match="arc_easy and lm_eval:arc_easy, whose results"):
        find_tasks(["arc_easy", "lm_eval:arc_easy"])


def test_the_metric_of_a_foreign_task_is_one_of_examples():
    from types import SimpleNamespace

    from lm_eval.api.metrics import mean, perplexity, weighted_perplexity

    from taia.evaluation.examples import primary_metric

    def task(**metrics):
        config = SimpleNamespace(metadata={"version": 1}, task="theirs")
        return SimpleNamespace(config=config, aggregation=lambda: metrics)

    assert primary_metric(task(perplexity=perplexity, acc=mean)) == "acc"
    with pytest.raises(EvaluationError, match="theirs: word_perplexity is of a whole data set"):
        primary_metric(task(word_perplexity=weighted_perplexity))


@pytest.mark.slow
def test_the_papers_protocol_end_to_end(tmp_path):
    """Letters, numbers, spans and summaries on a tiny model; without a template it is refused."""
    base = tiny_chat_model(tmp_path / "base", "float32")
    free = {"id": "1", "question": "1 and 1?", "answer": "2"}
    reading = {"id": "1", "context": "Ice.", "question": "What?", "answers": []}
    write(tmp_path / "csqa.jsonl", MMLU[0], MMLU[1])
    write(tmp_path / "svamp.jsonl", free)
    write(tmp_path / "squad2.jsonl", reading)
    write(tmp_path / "xsum.jsonl", {"id": "1", "document": "Ice is.", "summary": "Ice."})
    names = ["csqa", "svamp", "squad2", "xsum"]
    options = {"tasks": names, "variants": ["base"], "dtype": "float32", "data": tmp_path}
    evaluate(base, tmp_path / "run", protocol="paper", **options)
    results = read_results(tmp_path / "run")
    metrics = {task.metric for task in results.settings.tasks.values()}
    assert metrics == {"acc", "math_verify", "f1", "rougeL"}
    (answer,) = results.examples["base", "svamp"]
    assert "The answer is" in answer.prediction
    assert answer.target == "2"
    assert [one.subject for one in results.examples["base", "csqa"]] == ["law", "law"]
    (base / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="chat template"):
        evaluate(base, tmp_path / "bare", protocol="paper", **options)
    assert not (tmp_path / "bare").exists()


def test_prompts_that_are_cut_are_told(caplog):
    import logging

    from taia.evaluation.quiet import quiet_lm_eval

    logger = logging.getLogger("lm_eval.models.huggingface")
    with quiet_lm_eval():
        logger.warning("Left truncation applied. Original sequence length was 9, to 5.")
        logger.warning("something else")
    assert [record.getMessage()[:4] for record in caplog.records] == ["Left"]
