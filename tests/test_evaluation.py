"""Evaluation on tiny models: what is written, what goes on, what is refused, what is equal.

The scores mean nothing here; the laws are that a variant in memory scores as the checkpoint
it stands for, that shared prompts change no number, and that lm-eval's own model class
gives the same answers from the same task files.
"""

from __future__ import annotations

import json
import shutil

import pytest

from taia.errors import (
    EvaluationError,
    OutputError,
    RecipeError,
    SelectionError,
    SourceError,
    TaiaError,
)
from taia.evaluation import harness, job
from taia.evaluation.catalogue import FOLDER
from taia.evaluation.harness import evaluate
from taia.evaluation.result import read_results

TEMPLATE = (
    "{% for m in messages %}<{{m.role}}>\n{{m.content}}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
CHANGES = {"vocab_size": 300, "max_position_embeddings": 256}
VARIANTS = ("base", "vanilla", "taia", "taif")
NOUNS = ("stone", "a river", "two old dogs", "salt", "the moon over town", "iron")


def tokenizer():
    """One token a byte: no download, any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, count in (("arc_easy", 5), ("mmlu", 4)):
        records = [
            {
                "id": f"{task}/{index}",
                "question": f"Which of these is number {index * 37}?",
                "choices": [NOUNS[(index + step) % 6] for step in range(3 + index % 2)],
                "answer": index % 3,
            }
            for index in range(count)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"eval_{task}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def models(pair, tmp_path_factory):
    """Folders of a base and a tuned checkpoint, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, made in zip(("base", "tuned"), pair("llama", **CHANGES), strict=True):
        shutil.copytree(made, folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def adapter(models):
    """A LoRA adapter with random factors on every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    tuned.save_pretrained(models / "adapter")
    return models / "adapter"


@pytest.fixture(scope="module")
def ask(models, data):
    """`evaluate` with what all tests share."""

    def call(out, **changes):
        options = {"tasks": ["arc_easy", "mmlu"], "data": data, "dtype": "float32"}
        return evaluate(models / "base", out, **(options | changes))

    return call


@pytest.fixture(scope="module")
def run(ask, adapter, tmp_path_factory):
    """A finished evaluation of four variants of an adapter."""
    out = tmp_path_factory.mktemp("run") / "out"
    summary = ask(out, adapter=adapter, variants=VARIANTS)
    return out, summary


def values(results, variant):
    return [
        value
        for task in results.tasks
        for example in results.examples[variant, task]
        for value in example.loglikelihoods
    ]


def test_what_a_run_holds(run, data):
    out, summary = run
    assert json.loads((out / "summary.json").read_text()) == summary
    results = read_results(out)
    for task in ("arc_easy", "mmlu"):
        text = (data / f"eval_{task}.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        for variant in VARIANTS:
            examples = results.examples[variant, task]
            assert [one.id for one in examples] == [record["id"] for record in records]
            assert [one.target for one in examples] == [record["answer"] for record in records]
            for one, record in zip(examples, records, strict=True):
                assert len(one.loglikelihoods) == len(record["choices"])
                assert one.correct == one.metrics[one.metric] == (one.prediction == one.target)
    assert {row["metric"] for row in summary["tasks"].values()} == {"acc", "acc_norm"}
    assert summary["tasks"]["arc_easy"]["examples"] == 5


def test_variants_differ(run):
    results = read_results(run[0])
    answers = {tuple(values(results, variant)) for variant in VARIANTS}
    assert len(answers) == len(VARIANTS)


@pytest.mark.slow
def test_a_variant_in_memory_scores_as_its_checkpoint(run, ask, models, adapter, tmp_path):
    from taia.splice import splice

    results = read_results(run[0])
    for variant, keep in (("taia", "attention"), ("taif", "ffn"), ("vanilla", "all")):
        folder = tmp_path / variant
        splice(models / "base", adapter, folder, keep=keep, merge=True)
        ask(tmp_path / f"run-{variant}", tuned=folder, variants=["vanilla"])
        there = read_results(tmp_path / f"run-{variant}")
        assert values(there, "vanilla") == pytest.approx(values(results, variant), abs=1e-3)


@pytest.mark.slow
def test_a_tuned_checkpoint_is_spliced_for_its_variants(ask, models, tmp_path):
    from taia.splice import splice

    ask(tmp_path / "run", tuned=models / "tuned", variants=["base", "vanilla", "taia"])
    splice(models / "base", models / "tuned", tmp_path / "taia", keep="attention")
    ask(tmp_path / "direct", tuned=tmp_path / "taia", variants=["vanilla"])
    results, direct = read_results(tmp_path / "run"), read_results(tmp_path / "direct")
    assert values(results, "taia") == values(direct, "vanilla")
    assert values(results, "taia") != values(results, "vanilla")


def test_a_complete_file_is_kept_and_a_missing_one_computed(run, ask, adapter, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    files = sorted((out / "results").rglob("*.jsonl"))
    texts = {file: file.read_bytes() for file in files}
    stamps = {file: file.stat().st_mtime_ns for file in files}
    lost, cut = out / "results/taia/mmlu.jsonl", out / "results/base/arc_easy.jsonl"
    lost.unlink()
    cut.write_bytes(texts[cut][:-9])
    seen = []
    summary = ask(out, adapter=adapter, variants=VARIANTS, on_progress=seen.append)
    assert summary["scores"] == run[1]["scores"]
    assert {file: file.read_bytes() for file in files} == texts
    changed = {file for file in files if file.stat().st_mtime_ns != stamps[file]}
    assert changed == {lost, cut}
    assert {(one.variant, one.task) for one in seen} == {("taia", "mmlu"), ("base", "arc_easy")}
    assert seen[-1].done == seen[-1].total


def test_a_finished_run_needs_no_model(run, ask, adapter, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    monkeypatch.setattr(harness, "variant_models", None)
    monkeypatch.setattr(job, "load_task", None)
    assert ask(out, adapter=adapter, variants=VARIANTS) == run[1]


def test_a_variant_that_is_added_joins_the_table(run, ask, adapter, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    summary = ask(out, adapter=adapter, variants=["half=all*0.5"], tasks=["mmlu"])
    assert [row["name"] for row in summary["variants"]] == [*VARIANTS, "half"]
    with pytest.raises(EvaluationError, match=r"variant half: 'all\*0.5' then, 'ffn' now"):
        ask(out, adapter=adapter, variants=["half=ffn"], tasks=["mmlu"])
    assert len(summary["scores"]) == 10


def test_other_settings_are_refused_and_told(run, ask, adapter, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(EvaluationError, match="--overwrite") as caught:
        ask(out, adapter=adapter, variants=["base"], limit=2, protocol="plain", seed=1)
    assert {fault.split(":")[0] for fault in caught.value.faults} == {"limit", "protocol", "seed"}
    with pytest.raises(OutputError, match="evaluated before"):
        ask(out, adapter=adapter, resume=False)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    summary = ask(out, adapter=adapter, variants=["base"], limit=2, overwrite=True)
    assert [row["examples"] for row in summary["scores"]] == [2, 2]
    assert [path.name for path in (out / "results").iterdir()] == ["base"]


def test_another_backend_is_other_settings_and_other_versions_are_told(
    run, ask, adapter, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    stated = json.loads((out / "settings.json").read_text())
    monkeypatch.setattr(job, "find_spec", lambda name: name)  # as if vLLM were there
    with pytest.raises(EvaluationError, match="backend: 'hf' then, 'vllm' now"):
        ask(out, adapter=adapter, variants=VARIANTS, backend="vllm")
    assert stated.pop("backend") == "hf"  # as settings from before it was written down
    stated["versions"]["torch"] = "1.0"
    (out / "settings.json").write_text(json.dumps(stated))
    notes = []
    ask(out, adapter=adapter, variants=VARIANTS, on_note=notes.append, cache=False)
    assert [note for note in notes if "torch 1.0 then" in note]


def test_a_report_is_no_part_of_a_model(adapter, tmp_path):
    from taia.evaluation.variants import identity
    from taia.sources import resolve

    shutil.copytree(adapter, tmp_path / "adapter")
    before = identity(resolve(tmp_path / "adapter"))
    (tmp_path / "adapter" / "report.html").write_text("a page")
    assert identity(resolve(tmp_path / "adapter")) == before == identity(resolve(adapter))


def test_changed_data_is_other_settings(run, ask, adapter, data, tmp_path):
    out, other = tmp_path / "out", tmp_path / "data"
    shutil.copytree(run[0], out)
    shutil.copytree(data, other)
    ask(out, adapter=adapter, variants=VARIANTS, data=other)  # elsewhere, but the same
    text = (other / "eval_mmlu.jsonl").read_text()
    (other / "eval_mmlu.jsonl").write_text(text.replace("number 37", "number 38"))
    with pytest.raises(EvaluationError, match="sha256 of the data of mmlu"):
        ask(out, adapter=adapter, variants=VARIANTS, data=other)


def test_the_first_records_and_the_plain_protocol(ask, run, tmp_path):
    ask(tmp_path / "out", variants=["base"], limit=3, protocol="plain")
    plain, chat = read_results(tmp_path / "out"), read_results(run[0])
    assert [one.id for one in plain.examples["base", "mmlu"]] == [f"mmlu/{i}" for i in range(3)]
    hashes = [one.prompt_hash for one in chat.examples["base", "mmlu"][:3]]
    assert all(one.prompt_hash not in hashes for one in plain.examples["base", "mmlu"])


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"variants": ["taia"]}, EvaluationError, "--adapter or --tuned"),
        ({"variants": ["base", "base"]}, EvaluationError, "named twice"),
        ({"variants": []}, EvaluationError, "none is named"),
        ({"variants": ["taia=ffn"]}, EvaluationError, "preset taia"),
        ({"variants": ["attenton"]}, SelectionError, "attenton"),
        ({"variants": ["base"], "tasks": ["arc_esy"]}, EvaluationError, "arc_easy"),
        ({"variants": ["base"], "protocol": "papper"}, RecipeError, "chat, plain, paper"),
        ({"variants": ["base"], "limit": 0}, RecipeError, "limit 0"),
        ({"variants": ["base"], "batch_size": 0}, RecipeError, "batch size 0"),
        ({"variants": ["base"], "dtype": "int4"}, RecipeError, "int4"),
        ({"variants": ["base"], "backend": "tpu"}, RecipeError, "hf, vllm"),
        ({"adapter": "no/such"}, SourceError, "no/such"),
        ({"adapter": "x", "tuned": "y"}, RecipeError, "one of them"),
    ],
)
def test_bad_input_writes_nothing(ask, tmp_path, changes, error, told):
    with pytest.raises(error) as caught:
        ask(tmp_path / "out", **changes)
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_wrong_form_of_tuning(ask, models, adapter, tmp_path):
    with pytest.raises(EvaluationError, match="--tuned"):
        ask(tmp_path / "out", adapter=models / "tuned")
    with pytest.raises(EvaluationError, match="--adapter"):
        ask(tmp_path / "out", tuned=adapter)


def test_an_adapter_of_another_model_writes_nothing(run, models, adapter, data, pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair("llama", **(CHANGES | {"intermediate_size": 80}))[0], other)
    tokenizer().save_pretrained(other)
    with pytest.raises(TaiaError):
        evaluate(other, tmp_path / "out", tasks=["mmlu"], adapter=adapter, data=data)
    assert not (tmp_path / "out").exists()
    shutil.copytree(run[0], tmp_path / "old")
    with pytest.raises(TaiaError):
        evaluate(
            other, tmp_path / "old", tasks=["mmlu"], adapter=adapter, data=data, overwrite=True
        )
    assert read_results(tmp_path / "old").tasks == ("arc_easy", "mmlu")


def test_a_folder_of_something_else_is_left_alone(ask, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a run"):
        ask(tmp_path, variants=["base"])
    (tmp_path / "results").mkdir()
    with pytest.raises(EvaluationError, match=r"settings\.json"):
        ask(tmp_path, variants=["base"])
    (tmp_path / "results" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a run"):
        ask(tmp_path, variants=["base"], overwrite=True)
    assert (tmp_path / "diary.txt").read_text() == "mine"
    assert (tmp_path / "results" / "thesis.txt").is_file()


def test_results_are_not_written_into_a_model(ask, models):
    with pytest.raises(OutputError, match="is a model"):
        ask(models / "base", variants=["base"], overwrite=True)


def test_a_model_without_chat_template(models, data, tmp_path):
    shutil.copytree(models / "base", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    options = {"tasks": ["mmlu"], "variants": ["base"], "data": data, "dtype": "float32"}
    with pytest.raises(RecipeError, match="chat template"):
        evaluate(tmp_path / "bare", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_are_told(models, data, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "base")
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(EvaluationError, match="overflow"):
        evaluate(
            tmp_path / "broken", tmp_path / "out", tasks=["mmlu"], variants=["base"], data=data
        )
    with pytest.raises(EvaluationError, match="taia eval"):
        read_results(tmp_path / "out")


@pytest.mark.slow
def test_lm_evals_own_model_class_gives_the_same(run, models, adapter, data, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from taia.evaluation.quiet import quiet_lm_eval
    from taia.splice import splice

    splice(models / "base", adapter, tmp_path / "taia", keep="attention", merge=True)
    manager = TaskManager(include_path=str(FOLDER), metadata={"data": str(data)})
    with quiet_lm_eval():
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(tmp_path / "taia"), "dtype": "float32"},
            tasks=["taia_arc_easy", "taia_mmlu"],
            task_manager=manager,
            apply_chat_template=True,
            bootstrap_iters=0,
            batch_size=4,
            device="cpu",
        )
    ours = read_results(run[0])
    for task, metric in (("arc_easy", "acc_norm"), ("mmlu", "acc")):
        examples = ours.examples["taia", task]
        samples = theirs["samples"][f"taia_{task}"]
        accuracy = sum(one.correct for one in examples) / len(examples)
        assert theirs["results"][f"taia_{task}"][f"{metric},none"] == pytest.approx(accuracy)
        for one, other in zip(examples, samples, strict=True):
            assert one.id == other["doc"]["id"]
            there = [value for value, _ in other["filtered_resps"]]
            assert one.loglikelihoods == pytest.approx(there, abs=1e-3)
