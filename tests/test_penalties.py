"""Penalties against what they abbreviate: products, per-example gradients, a second model."""

from __future__ import annotations

import json

import pytest
import torch
from chat_tools import tiny_chat_model
from safetensors.torch import load_file

from taia.errors import RecipeError
from taia.load import load_model
from taia.molora import mixtures
from taia.training.callbacks import read_log
from taia.training.finetune import finetune
from taia.training.fisher import cached_fisher, fisher
from taia.training.objective import Additions, Objective, Part
from taia.training.penalties import deltas, ewc, frozen_copy, kl, l2, without_adapter
from taia.training.spans import IGNORED
from taia.training.trainable import add_lora, freeze_rest, trained_weights

MIXTURE = {"experts": 4, "experts_per_token": 2}
METHODS = {"lora": {}, "dora": {"dora": True}, "molora": {"mixture": MIXTURE}}
EXAMPLES = [
    {"input_ids": [5, 9, 7, 3, 8], "labels": [IGNORED, IGNORED, 7, 3, 8]},
    {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]},
    {"input_ids": [4, 4, 8, 250], "labels": [IGNORED, 4, IGNORED, 250]},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"), dtype="float32")


@pytest.fixture(scope="module")
def gpt2(pair):
    return pair("gpt2")[0]


def tuned(base, method: str):
    """A model with random factors on everything."""
    torch.manual_seed(3)
    options = {"rank": 3, "alpha": 5, "dropout": 0.0} | METHODS[method]
    model = add_lora(load_model(base, dtype="float32"), "all", **options)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.requires_grad:
            parameter.data *= 1.1
    return model


def explicit(model, start) -> dict[str, list[torch.Tensor]]:
    """Every delta as PEFT would merge it, by weight; of a mixture one for each expert."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        if hasattr(layer, "lora_experts_A"):
            products = [b @ a for a, b in layer.expert_factors("default")]
            found[weight] = [layer.scaling["default"] * product for product in products]
        elif "default" in layer.lora_magnitude_vector:
            rows = layer.base_layer.weight + layer.get_delta_weight("default")
            size = rows.norm(dim=1, keepdim=True)
            magnitude = layer.lora_magnitude_vector["default"].weight.reshape(-1, 1)
            found[weight] = [magnitude * rows / size - start[weight]]
        else:
            found[weight] = [layer.get_delta_weight("default")]
    return found


def gradients(value, model) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, trained, allow_unused=True, retain_graph=True)
    return [torch.zeros(()) if one is None else one for one in found]


def same(one, other) -> None:
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_l2_and_ewc_are_those_of_the_product(method, base):
    model = tuned(base, method)
    start = {n: t.float() for n, t in load_file(base / "model.safetensors").items()}
    weights = {name: torch.rand_like(tensor) for name, tensor in start.items()}
    products = explicit(model, start)
    assert len(products) == 14
    square = sum(one.square().sum() for many in products.values() for one in many)
    weighted = sum(
        (weights[n] * one.square()).sum() for n, many in products.items() for one in many
    )
    for ours, theirs in (
        (l2(deltas(model)), square),
        (ewc(deltas(model), weights.__getitem__), weighted),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        same(gradients(ours, model), gradients(theirs, model))


@pytest.mark.parametrize("method", METHODS)
def test_no_delta_is_kept_for_the_way_back(method, base):
    model = tuned(base, method)
    start = {n: t.float() for n, t in load_file(base / "model.safetensors").items()}
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = ewc(deltas(model), start.__getitem__) + l2(deltas(model))
    smallest = min(p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    assert value.requires_grad
    assert max(kept, default=0) < smallest


@pytest.mark.parametrize("method", ["lora", "molora"])
def test_conv1d_weights_are_the_other_way_round(method, gpt2):
    model = tuned(gpt2, method)
    shapes = {name: p.shape for name, p in load_model(gpt2, dtype="float32").named_parameters()}
    for change in deltas(model):
        assert change.value(*change.parameters).shape == shapes[change.weight], change.weight
    assert any(one[0] != one[1] for name, one in shapes.items() if "c_fc.weight" in name)


def test_full_deltas_are_the_difference_to_the_copy(base):
    model = load_model(base, dtype="float32")
    freeze_rest(model, "attention + ffn[1]")
    copy = frozen_copy(model, torch.float32)
    assert len(copy) == 2 * 4 + 3
    assert l2(deltas(model, copy)) == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data += 0.5
    count = sum(p.numel() for p in trained)
    value = l2(deltas(model, copy))
    torch.testing.assert_close(value, torch.tensor(0.25 * count), rtol=1e-4, atol=0)
    same(gradients(value, model), [torch.ones_like(p) for p in trained])


def test_fisher_is_the_mean_square_of_per_example_gradients(base):
    model = load_model(base, dtype="float32")
    weights = trained_weights(model, "all", "lora")
    flags = [p.requires_grad for p in model.parameters()]
    found = fisher(model, EXAMPLES, weights)
    assert found.keys() == set(weights)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())

    named = {name: p.detach() for name, p in model.named_parameters()}

    def likelihood(parameters, example):
        ids = torch.tensor([example["input_ids"]])
        logits = torch.func.functional_call(model, parameters, (ids,)).logits[0]
        logs = logits.log_softmax(-1)
        places = [n for n, label in enumerate(example["labels"]) if n and label != IGNORED]
        return sum(logs[place - 1, example["labels"][place]] for place in places)

    each = [torch.func.grad(likelihood)(named, example) for example in EXAMPLES]
    for name in weights:
        expected = sum(one[name].square() for one in each) / len(each)
        assert expected.any()
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


def test_the_cache_is_used_again_and_knows_what_it_is_of(base, tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path))
    model = load_model(base, dtype="float32")
    weights = trained_weights(model, "attention", "lora")
    first = cached_fisher(model, EXAMPLES, weights)
    written = first.path.stat().st_mtime_ns
    again = cached_fisher(model, EXAMPLES, weights)
    assert (again.path, again.path.stat().st_mtime_ns) == (first.path, written)
    assert torch.equal(first(weights[0]), fisher(model, EXAMPLES, weights)[weights[0]])
    assert cached_fisher(model, EXAMPLES[:2], weights).path != first.path
    assert cached_fisher(model, EXAMPLES, weights[:1]).path != first.path
    model.lm_head.weight.data[0, 0] += 1
    assert cached_fisher(model, EXAMPLES, weights).path != first.path


def batch():
    ids = torch.arange(24).reshape(3, 8) * 7
    labels = ids.masked_fill(torch.rand(3, 8) < 0.4, IGNORED)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("method", METHODS)
def test_kl_is_that_to_a_second_model(method, base):
    model, inputs = tuned(base, method).eval(), batch()
    with torch.no_grad():
        second = load_model(base, dtype="float32")(inputs["input_ids"]).logits
        with without_adapter(model):
            torch.testing.assert_close(model(inputs["input_ids"]).logits, second)
            assert not model.training
    ours = model(inputs["input_ids"]).logits
    counts = inputs["labels"][:, 1:] != IGNORED
    logs, reference = (one[:, :-1][counts].log_softmax(-1) for one in (ours, second))
    expected = torch.nn.functional.kl_div(reference, logs, log_target=True, reduction="sum")
    value = kl(ours[:, :-1], second[:, :-1], inputs["labels"][:, 1:])
    torch.testing.assert_close(value, expected)
    assert value > 0
    same(gradients(value, model), gradients(expected, model))


def test_without_adapter_leaves_everything_as_it_was(base):
    model = tuned(base, "molora").train()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(IndexError), without_adapter(model):
        flags[len(flags)]
    assert model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(layer.disable_adapters for _, layer in mixtures(model))


@pytest.mark.parametrize("method", ["lora", "molora"])
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_cut(method, base):
    """Two parts of a batch against the whole; l2 and the task exactly, KL by its tokens."""
    model = tuned(base, method).train()
    added = Additions(penalty={"l2": 0.3, "kl": 0.7})
    inputs = batch()
    items = (inputs["labels"][:, 1:] != IGNORED).sum()
    found = []
    for cuts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        objective, total = Objective(model, added), torch.zeros(())
        for cut in cuts:
            part = {name: tensor[cut] for name, tensor in inputs.items()}
            objective.expect(part["attention_mask"])
            outputs = model(**part, num_items_in_batch=items)
            step = Part(step=0, parts=len(cuts), items=items, processes=1)
            total = total + objective.total(outputs.loss, outputs, part, step)
        values = objective.values_of_step(lambda tensor: tensor)
        weighted = values["task_loss"] + 0.3 * values["l2"] + 0.7 * values["kl"]
        assert abs(total.item() - weighted) < 1e-4
        found.append((total, gradients(total, model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    same(found[0][1], found[1][1])


def test_an_evaluation_between_steps_is_of_the_task_alone(base):
    model, inputs = tuned(base, "molora").eval(), batch()
    objective = Objective(model, Additions(penalty={"l2": 1.0, "kl": 1.0}, balance=1.0))
    outputs = model(**inputs)
    assert objective.total(outputs.loss, outputs, inputs, Part(0, 1, None, 1)) is outputs.loss
    assert objective.values_of_step(lambda tensor: tensor) == {}
    outputs = model.train()(**inputs)  # and the step after it has its penalties
    assert objective.total(outputs.loss, outputs, inputs, Part(0, 1, None, 1)) > outputs.loss + 1


def test_reentrant_checkpointing_cannot_lose_the_balance_loss(base):
    model = tuned(base, "molora").train()
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    objective, inputs = Objective(model, Additions(balance=0.1)), batch()
    outputs = model(**inputs)
    with pytest.raises(RecipeError, match="use_reentrant=False"):
        objective.total(outputs.loss, outputs, inputs, Part(0, 1, None, 1))


FAST = {"batch_size": 4, "learning_rate": 1e-2, "rank": 2, "max_length": 64, "max_steps": 4}
CASES = {
    "lora": {"penalty": {"l2": 0.1, "ewc": 1.0, "kl": 0.1}},
    "molora": {"method": "molora", "balance": 0.1, "penalty": {"l2": 0.1, "ewc": 1.0, "kl": 0.1}},
    "full": {"method": "full", "train": "ffn", "penalty": {"l2": 0.1, "ewc": 1.0}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [{"instruction": f"{n}?", "output": "yes " * (n % 5 + 1)} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_logs_each_part_of_its_loss(case, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    base = tiny_chat_model(tmp_path / "base")
    options = FAST | CASES[case] | {"fisher_data": data, "fisher_examples": 3}
    out = finetune(base, data, tmp_path / "o", **options).out
    lines = read_log(out / "log.jsonl")
    strengths = dict(CASES[case]["penalty"])
    if case == "molora":
        strengths["balance"] = 0.1
        shares = [lines[-1][f"router_load_{expert}"] for expert in range(4)]
        assert abs(sum(shares) - 1) < 1e-4
        assert lines[-1]["router_load_max"] > max(shares) - 1e-6
    for line in lines:
        parts = sum(strength * line[name] for name, strength in strengths.items())
        assert abs(line["loss"] - line["task_loss"] - parts) < 1e-4
    penalties = CASES[case]["penalty"]
    assert all(lines[0][name] == 0 for name in penalties)
    assert all(lines[-1][name] > 0 for name in penalties)
    record = json.loads((out / "train.json").read_text())
    assert record["fisher_bytes"] > 0
    assert ("frozen_copy_bytes" in record) == (case == "full")
    assert record["settings"]["penalty"] == penalties


@pytest.mark.slow
def test_a_penalty_holds_the_fine_tune_back(base, data, tmp_path):
    sizes = []
    for strength in (0.0, 1.0):
        penalty = {"l2": strength} if strength else {"kl": 1e-9}
        out = finetune(base, data, tmp_path / str(strength), penalty=penalty, **FAST).out
        tensors = load_file(out / "adapter_model.safetensors")
        sizes.append(sum(t.square().sum() for n, t in tensors.items() if "lora_B" in n))
    assert sizes[1] < sizes[0]


def test_other_fisher_data_on_resume_is_refused(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    chats = tmp_path / "general.jsonl"
    chats.write_bytes(data.read_bytes())
    options = FAST | {"penalty": {"ewc": 1.0}, "fisher_data": chats}

    def stop(line):
        if line["step"] == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finetune(base, data, tmp_path / "o", on_progress=stop, **options)
    chats.write_text("\n".join(chats.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(RecipeError, match="another Fisher information"):
        finetune(base, data, tmp_path / "o", resume=True, **options)


BAD = {
    "more than the 2": {"method": "molora", "experts": 2, "experts_per_token": 3},
    "at least 1": {"method": "molora", "experts": 0},
    "setting of method molora": {"experts": 8},
    "choose from l2, ewc, kl": {"penalty": {"l3": 1.0}},
    "above 0 and finite": {"penalty": {"l2": -1.0}},
    "in memory a second time": {"method": "full", "penalty": {"kl": 1.0}},
    "go together": {"penalty": {"ewc": 1.0}},
    "balance is -1": {"method": "molora", "balance": -1.0},
    "expert_dropout is 1": {"method": "molora", "expert_dropout": 1.0},
    "fisher_examples is 0": {"fisher_examples": 0},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_settings_are_told(said, base, data, tmp_path):
    with pytest.raises(RecipeError) as caught:
        finetune(base, data, tmp_path / "o", **FAST | BAD[said])
    assert said in str(caught.value)
    assert not (tmp_path / "o").exists()
