"""MoLoRA against a loop over its experts, against its peers, and through PEFT and the splicer."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from chat_tools import tiny_chat_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import taia
from taia.adapter import read_adapter
from taia.analysis.deltas import delta_norms
from taia.attach import attach
from taia.changes import PREFIX
from taia.errors import CheckpointError, MismatchError, RecipeError, TaiaError
from taia.load import load_model
from taia.molora import MoLoraConfig, MoLoraLinear, mixtures, register
from taia.routing import balance_loss, gates, routing

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = [(e, k) for e, k in itertools.product((1, 2, 4, 8), (1, 2)) if k <= e]


def config(experts: int = 4, chosen: int = 2, **changes) -> MoLoraConfig:
    fields = {
        "r": 3, "lora_alpha": 5, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM",
        "expert_modules": list(PROJECTIONS[4:]),
    }  # fmt: skip
    return MoLoraConfig(**fields | changes, experts=experts, experts_per_token=chosen)


def randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def layer(experts: int, chosen: int, base: nn.Module | None = None, **changes) -> MoLoraLinear:
    torch.manual_seed(experts * 10 + chosen)
    base = nn.Linear(12, 7) if base is None else base
    made = MoLoraLinear(base, "default", 3, 5, config(experts, chosen, **changes))
    randomise(made)
    return made


def naive(module: MoLoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The formula as it stands: token by token, expert by expert."""
    pairs = module.expert_factors("default")
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        change = torch.zeros(module.out_features)
        shares = {0: torch.tensor(1.0)}
        if len(pairs) > 1:
            logits = module.lora_router["default"](token)
            best = sorted(range(len(pairs)), key=lambda e: -logits[e].item())
            best = best[: module.chosen["default"]]
            shares = dict(zip(best, logits[best].softmax(0), strict=True))
        for expert, share in shares.items():
            a, b = pairs[expert]
            change = change + share * module.scaling["default"] * (b @ (a @ token))
        rows.append(module.base_layer(token) + change)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"), dtype="float32")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A MoLoRA adapter whose every tensor is random."""
    register()
    torch.manual_seed(1)
    model = get_peft_model(load_model(base, dtype="float32"), config())
    randomise(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


IDS = torch.arange(40).reshape(2, 20) * 5


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(("experts", "chosen"), SIZES)
@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
def test_forward_and_gradients_are_those_of_the_loop(experts, chosen, make):
    module = layer(experts, chosen, make(12, 7))
    x = torch.randn(2, 9, 12, requires_grad=True)
    weight = torch.randn(2, 9, 7)
    results = []
    for function in (module, lambda x: naive(module, x)):
        named = [p for n, p in module.named_parameters() if "lora_" in n]
        out = function(x)
        gradients = torch.autograd.grad((out * weight).sum(), [x, *named], allow_unused=True)
        results.append([out, *(torch.zeros(1) if g is None else g for g in gradients)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=0, atol=1e-5)


def test_one_expert_is_lora():
    from peft.tuners.lora import Linear

    module = layer(1, 1)
    plain = Linear(module.base_layer, "default", config(1, 1), r=3, lora_alpha=5)
    plain.lora_A["default"].weight = module.lora_experts_A["default"].weight
    plain.lora_B["default"].weight = module.lora_experts_B["default"].weight
    x = torch.randn(4, 12)
    assert torch.equal(module(x), plain(x))


def test_a_new_adapter_changes_nothing(base):
    register()
    model = load_model(base, dtype="float32")
    before = logits(model)
    assert torch.equal(logits(get_peft_model(model, config())), before)


@pytest.mark.parametrize("chosen", [1, 2])
def test_the_balance_loss_is_mixtrals(chosen):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = torch.randn(2, 11, 5)
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    seen = routing(scores, gates(scores, chosen), mask)
    peer = load_balancing_loss_func((scores.reshape(-1, 5),), 5, chosen, mask)
    torch.testing.assert_close(balance_loss(seen), peer)
    flat = torch.zeros(1, 5)
    torch.testing.assert_close(routing(flat, gates(flat, 1)).entropy, torch.tensor(math.log(5)))
    torch.testing.assert_close(seen.load.sum(), torch.tensor(float(chosen)))


def test_dropped_experts_are_not_chosen_and_enough_are_left():
    torch.manual_seed(0)
    scores = torch.randn(2000, 4)
    for chosen in (1, 2, 4):
        kept = gates(scores, chosen, dropout=0.9)
        assert ((kept > 0).sum(-1) == chosen).all()
        torch.testing.assert_close(kept.sum(-1), torch.ones(2000))
    best = scores.argmax(-1, keepdim=True)
    share = (gates(scores, 1, dropout=0.3).gather(-1, best) > 0).float().mean()
    # 0.7, and in 0.3^4 of the cases all four would go and the luckiest, one in four, stays
    assert abs(share - (0.7 + 0.3**4 / 4)) < 0.04


def test_padding_does_not_count_in_the_statistics():
    module = layer(4, 1).train()
    x = torch.randn(1, 6, 12)
    module(x[:, :4])
    alone = module.seen
    module.mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    module(x)
    for ours, theirs in zip(module.seen, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    module.eval()
    module.seen = None
    module(x)
    assert module.seen is None


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16 autocast"])
def test_gradient_checkpointing_changes_nothing(half, base):
    register()
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        dtype = "bfloat16" if half else "float32"
        model = get_peft_model(load_model(base, dtype=dtype), config(lora_dropout=0.1))
        randomise(model)
        if checkpointed:
            model.enable_input_require_grads()
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with torch.autocast("cpu", enabled=half):
            loss = model.train()(IDS, labels=IDS).loss
        seen = [module.seen for _, module in mixtures(model)]
        (loss + sum(balance_loss(one) for one in seen)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert {p.dtype for p in found[0].values()} == {torch.float32}
    assert len(found[0]) == 2 * (4 * 2 + 3 * 4)
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, found[1][name])


def test_peft_loads_what_it_saves(base, adapter):
    stored = PeftConfig.from_pretrained(adapter)
    assert isinstance(stored, MoLoraConfig)
    assert (stored.peft_type, stored.experts) == ("MOLORA", 4)
    model = PeftModel.from_pretrained(load_model(base, dtype="float32"), adapter)
    tensors, loaded = load_file(adapter / "adapter_model.safetensors"), model.state_dict()
    assert len(tensors) == 2 * (4 * 2 + 3 * 4)
    for name, tensor in tensors.items():
        place = name.replace(".weight", ".default.weight").replace(".bias", ".default.bias")
        assert torch.equal(loaded[place], tensor)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_model(base, dtype="float32")))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(MismatchError, match="depends on its input"):
            merge()
    assert torch.equal(logits(model), before)
    with pytest.raises(MismatchError, match="added up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(MismatchError, match="several adapters"):
        model(IDS, adapter_names=["default", "__base__"])
    assert torch.equal(logits(model.unload()), logits(load_model(base, dtype="float32")))


def test_two_adapters_on_one_model(base, adapter, tmp_path):
    """With other experts on other modules; the second on the meta device until it is loaded."""
    register()
    torch.manual_seed(5)
    small = config(2, 1, r=2, expert_modules=["down_proj"], target_modules=["q_proj", "down_proj"])
    other = get_peft_model(load_model(base, dtype="float32"), small)
    randomise(other)
    other.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load_model(base, dtype="float32"), adapter, is_trainable=True)
    first = logits(model)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(other))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".second." in name for name in trained)
    assert len(trained) == 2 * (2 + 4)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second." in name for name in model.state_dict())


def test_the_laws_of_selections(base, adapter, tmp_path):
    model = load_model(base, dtype="float32")
    plain = logits(model)
    whole = logits(PeftModel.from_pretrained(load_model(base, dtype="float32"), adapter))
    live = attach(model, adapter)
    found = {}
    for keep in ("all", "none", "attention", "ffn", "attention + ffn*0.5"):
        with live.using(keep):
            found[keep] = logits(model)
    live.close()
    assert torch.equal(found["all"], whole)
    assert torch.equal(found["none"], plain)
    assert torch.equal(logits(model), plain)
    assert len({round(value.sum().item(), 3) for value in found.values()}) == len(found)
    for number, keep in enumerate(("attention", "ffn", "attention + ffn*0.5", "all")):
        out = tmp_path / str(number)
        taia.slice_adapter(adapter, out, keep, base=base)
        taia.verify(out)
        kind = json.loads((out / "adapter_config.json").read_text())["peft_type"]
        assert kind == ("LORA" if keep == "attention" else "MOLORA")
        loaded = PeftModel.from_pretrained(load_model(base, dtype="float32"), out)
        torch.testing.assert_close(logits(loaded), found[keep])


@torch.inference_mode()
def test_packed_weights_leave_a_mixture_what_it_is(base, adapter):
    from taia.packed import packed

    live = taia.attach(load_model(base, dtype="bfloat16"), adapter)
    plain = logits(live.model)
    with live.using("all"):
        expected = logits(live.model)
        with packed(live.model):
            off = (logits(live.model) - expected).abs().mean()
    assert off < 0.1 * (plain - expected).abs().mean()  # rounding: attention is plain LoRA


def test_attention_alone_merges_and_a_mixture_does_not(base, adapter, tmp_path):
    taia.splice(base, adapter, tmp_path / "merged", keep="attention", merge=True)
    taia.verify(tmp_path / "merged")
    taia.slice_adapter(adapter, tmp_path / "sliced", "attention", base=base)
    taia.splice(base, tmp_path / "sliced", tmp_path / "again", keep="all", merge=True)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "again"))
    start = load_file(base / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name])
        assert torch.equal(tensor, start[name]) == ("self_attn" not in name)
    for keep in ("all", "attention + ffn[0]*0.1"):
        with pytest.raises(MismatchError, match="depends on its input") as caught:
            taia.splice(base, adapter, tmp_path / "no", keep=keep, merge=True)
        assert len(caught.value.faults) == (6 if keep == "all" else 3)
    assert not (tmp_path / "no").exists()


def test_ranks_that_differ_are_padded_expert_by_expert(base, tmp_path):
    register()
    torch.manual_seed(2)
    uneven = config(rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 7})
    model = get_peft_model(load_model(base, dtype="float32"), uneven)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    taia.slice_adapter(tmp_path / "adapter", tmp_path / "sliced", "all", base=base)
    loaded = PeftModel.from_pretrained(load_model(base, dtype="float32"), tmp_path / "sliced")
    assert {module.r["default"] for _, module in mixtures(loaded)} == {3}
    torch.testing.assert_close(logits(loaded), logits(model))


def test_norms_of_a_mixture_are_those_of_its_experts(base, adapter):
    experts = read_adapter(adapter).modules["model.layers.1.mlp.up_proj.weight"]
    squares = [((experts.scale * b @ a) ** 2).sum() for a, b in experts.factors(adapter)]
    assert len(squares) == 4
    found = next(
        norm.norm for norm in delta_norms(base, adapter)
        if (norm.kind, norm.layer, norm.projection) == ("ffn", 1, "up")
    )  # fmt: skip
    assert math.isclose(found**2, sum(squares) / 4, rel_tol=1e-4)


def _without(part):
    return lambda tensors: {n: v for n, v in tensors.items() if part not in n}


def _cut(part, cut):
    return lambda tensors: {n: cut(v).contiguous() if part in n else v for n, v in tensors.items()}


BROKEN = {
    "a router gone": (_without("router"), {}),
    "a bias gone": (_without("router.bias"), {}),
    "a router of another width": (_cut("router.weight", lambda v: v[:, :3]), {}),
    "a rank that does not divide": (_cut("experts_A", lambda v: v[:5]), {}),
    "plain factors beside": (
        lambda t: t | {n.replace("experts_A", "A"): v.clone() for n, v in t.items()}, {},
    ),
    "another number of experts": (dict, {"experts": 2}),
    "experts that the configuration lacks": (dict, {"expert_modules": ["up_proj"]}),
    "no mixture in the configuration": (dict, {"experts": 1, "expert_modules": None}),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_mixture_is_refused(what, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    stored = json.loads((adapter / "adapter_config.json").read_text())
    change, other = BROKEN[what]
    save_file(change(tensors), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | other))
    with pytest.raises(CheckpointError, match="experts"):
        read_adapter(tmp_path)


SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes_and_settings_are_read_or_refused(data, adapter, tmp_path_factory):
    """Whole mixtures, halves, wrong shapes, wrong counts: a TaiaError, or rank and experts."""
    place = f"{PREFIX}model.layers.0.mlp.up_proj."
    names = ("experts_A.weight", "experts_B.weight", "router.weight", "router.bias")
    fits = ((6, 4), (5, 6), (3, 4), (3,))
    tensors = {
        f"{place}lora_{name}": torch.zeros(data.draw(st.just(shape) | SHAPES))
        for name, shape in zip(names, fits, strict=True)
        if data.draw(st.integers(0, 9)) > 0
    }
    changes = {"experts": 3, "expert_modules": data.draw(st.sampled_from([["up_proj"], None, 3]))}
    changes["experts_per_token"] = data.draw(st.sampled_from([1, 2, 3, 4, 0, "1", None]))
    folder = tmp_path_factory.mktemp("drawn")
    stored = json.loads((adapter / "adapter_config.json").read_text())
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(stored | changes))
    try:
        (experts,) = read_adapter(folder).modules.values()
    except TaiaError:
        return
    assert (experts.experts, experts.rank * 3) == (3, tensors[f"{place}lora_{names[0]}"].shape[0])
    assert experts.a.shape[1] == experts.router[0].shape[1]


def test_settings_that_cannot_be():
    with pytest.raises(RecipeError, match="more than the 2 experts"):
        config(2, 3)
    with pytest.raises(RecipeError, match="use_dora"):
        config(use_dora=True)
    with pytest.raises(RecipeError, match=r"\[0, 1\)"):
        config(expert_dropout=1.0)
    register()
    wrong = config(expert_modules=["words"], target_modules=["words"])
    with pytest.raises(RecipeError, match="linear layers only"):
        get_peft_model(nn.ModuleDict({"words": nn.Embedding(3, 3)}), wrong)
