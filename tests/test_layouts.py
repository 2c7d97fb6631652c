"""Two layouts of one model: names by the library's own rules, bytes by views."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SMALL, build
from layout_tools import live_layout, rewrite, tensors, write

import taia
from taia.checkpoint import open_checkpoint
from taia.layouts import family_of, place_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

MOE = {"qwen3_moe": {**SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 16}}  # fmt: skip
STACKED = {"mixtral": FAMILIES["mixtral"], **MOE}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A function model_type -> {"base"/"tuned": {"split"/"stacked": folder}}."""
    made = {}

    def make(model_type):
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            FAMILIES.setdefault(model_type, STACKED[model_type])
            made[model_type] = {}
            for name, seed in (("base", 0), ("tuned", 1)):
                build(model_type, seed).save_pretrained(root / name)
                stacked = live_layout(root / name, root / f"{name}-stacked")
                made[model_type][name] = {"split": root / name, "stacked": stacked}
        return made[model_type]

    return make


def live(folder: Path) -> dict[str, torch.Tensor]:
    """The state of the model that transformers loads, with nothing missing or left over."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    return model.state_dict()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


CASES = [case for case in product(STACKED, ("split", "stacked"), ("split", "stacked"))
         if case[1:] != ("split", "split")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "first", "second"), CASES)
def test_stacked_and_split_experts_are_the_same_model(layouts, tmp_path, model_type, first, second):
    made = layouts(model_type)
    base, tuned = made["base"][first], made["tuned"][second]
    alike = made["base"]["split"], made["tuned"]["split"]
    for keep in ("all", "none", "attention", "ffn", "ffn*0.5 + router"):
        name = keep.replace("*", "x")
        taia.splice(base, tuned, tmp_path / name, keep=keep)
        taia.verify(tmp_path / name)
        taia.splice(*alike, tmp_path / f"{name}-alike", keep=keep)
        assert same(live(tmp_path / name), live(tmp_path / f"{name}-alike")), keep
    assert same(live(tmp_path / "all"), live(tuned))
    assert same(live(tmp_path / "none"), live(base))
    assert len(tensors(tmp_path / "all")) == max(len(tensors(f)) for f in (base, tuned))


@pytest.mark.parametrize("spoil", ["missing", "shape"])
def test_stacks_that_do_not_fit_are_refused_with_both_names(layouts, tmp_path, spoil):
    made = layouts("qwen3_moe")
    stacked = tensors(made["tuned"]["stacked"])
    split = tensors(made["base"]["split"])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    if spoil == "missing":
        del split["model.layers.0.mlp.experts.1.up_proj.weight"]
    else:
        stacked[name] = stacked[name][:, :-2]
    base = write(tmp_path / "base", split, made["base"]["split"])
    tuned = write(tmp_path / "tuned", stacked, made["base"]["split"])
    with pytest.raises(taia.TaiaError) as caught:
        taia.plan(base, tuned).refuse_faults()
    assert name in str(caught.value)
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in str(caught.value)


def old_gpt2(name: str) -> str:
    return name.removeprefix("transformer.")


@pytest.mark.parametrize("keep", ["all", "none", "attention"])
def test_gpt2_of_the_hub_with_buffers_and_without_a_prefix(pair, tmp_path, keep):
    base, tuned = pair("gpt2")
    state = {old_gpt2(name): tensor for name, tensor in tensors(base).items()}
    for layer in range(3):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    old = write(tmp_path / "old", state, base)
    planned = taia.plan(old, tuned, keep)
    assert "only in the base, kept from it" in planned.notes[0]
    taia.splice(old, tuned, tmp_path / "out", keep=keep)
    taia.verify(tmp_path / "out")
    taia.splice(base, tuned, tmp_path / "alike", keep=keep)
    assert same(live(tmp_path / "out"), live(tmp_path / "alike"))
    assert torch.equal(tensors(tmp_path / "out")["h.0.attn.bias"], torch.ones(1, 1, 64, 64).tril())
    taia.splice(tuned, old, tmp_path / "back", keep=keep)
    assert "left out" in taia.plan(tuned, old, keep).notes[0]
    assert not any(name.endswith(".attn.bias") for name in tensors(tmp_path / "back"))
    taia.splice(tuned, base, tmp_path / "back-alike", keep=keep)
    assert same(live(tmp_path / "back"), live(tmp_path / "back-alike"))


def test_a_real_bias_is_no_buffer(pair, tmp_path):
    base, tuned = pair("gpt2")
    name = "transformer.h.0.attn.c_attn.bias"
    short = rewrite(tuned, tmp_path / "short", lambda n: None if n == name else n)
    with pytest.raises(taia.TaiaError, match=r"c_attn\.bias: in the base, not in the tuned"):
        taia.plan(base, short).refuse_faults()
    with pytest.raises(taia.TaiaError, match=r"c_attn\.bias: in the tuned model, not in the base"):
        taia.plan(short, base).refuse_faults()


@pytest.mark.parametrize("missing_in", ["tuned", "base"])
def test_a_prediction_layer_behind_the_last_one(pair, tmp_path, missing_in):
    base, tuned = pair("llama")
    extra = {
        name.replace("layers.2.", "layers.3."): tensor + 1
        for name, tensor in tensors(base).items()
        if "layers.2." in name
    }
    longer = write(tmp_path / "longer", tensors(base) | extra, base)
    if missing_in == "tuned":
        taia.splice(longer, tuned, tmp_path / "out", keep="all")
        taia.verify(tmp_path / "out")
        out = tensors(tmp_path / "out")
        assert all(torch.equal(out[name], tensor) for name, tensor in extra.items())
        assert same({n: t for n, t in out.items() if n not in extra}, tensors(tuned))
        assert "9 " not in taia.plan(longer, tuned).notes[0][:2]
    else:
        planned = taia.plan(tuned, longer, "all")
        assert "left out; transformers does not load" in planned.notes[0]
        taia.splice(tuned, longer, tmp_path / "out", keep="all")
        assert same(tensors(tmp_path / "out"), tensors(base))


GEMMA = {
    "text_config": {**SMALL, "head_dim": 8, "sliding_window": 8},
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    "mm_tokens_per_image": 4,
}  # fmt: skip


def moved(name: str) -> str:
    """A name of the first multimodal releases under the path of the live model."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.mark.slow
def test_moved_paths_of_a_multimodal_model(tmp_path):
    FAMILIES["gemma3"] = GEMMA
    for name, seed in (("base", 0), ("tuned", 1)):
        build("gemma3", seed).save_pretrained(tmp_path / name)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert any(name != moved(name) for name in tensors(base))
    new = rewrite(tuned, tmp_path / "new", moved)
    for keep in ("all", "none", "attention@language", "all - ffn"):
        taia.splice(base, new, tmp_path / "out", keep=keep, overwrite=True)
        taia.splice(base, tuned, tmp_path / "alike", keep=keep, overwrite=True)
        assert same(tensors(tmp_path / "out"), tensors(tmp_path / "alike")), keep
        taia.splice(new, base, tmp_path / "back", keep=keep, overwrite=True)
        taia.splice(tuned, base, tmp_path / "alike", keep=keep, overwrite=True)
        assert same(live(tmp_path / "back"), live(tmp_path / "alike")), keep


def test_names_that_no_rule_brings_together_are_both_told(pair, tmp_path):
    base, tuned = pair("llama")
    other = rewrite(tuned, tmp_path / "other", lambda n: n.replace("q_proj", "query"))
    with pytest.raises(taia.TaiaError) as caught:
        taia.plan(base, other).refuse_faults()
    assert "model.layers.0.self_attn.q_proj.weight: in the base" in str(caught.value)
    assert "model.layers.0.self_attn.query.weight: in the tuned" in str(caught.value)


def test_a_usual_pair_is_not_looked_up(pair):
    base, tuned = pair("llama")
    planned = taia.plan(base, tuned)
    assert planned.notes == ()
    assert planned.base.tensors == open_checkpoint(base).tensors


TYPES = ["mixtral", "qwen3_moe", "gemma3", "gpt_neox", "qwen2_vl", "llava", "qwen3_5"]


@pytest.mark.parametrize("model_type", [*TYPES, pytest.param("every", marks=pytest.mark.slow)])
def test_names_go_where_transformers_puts_them(model_type):
    """The rules as they ship against the library's own renaming of every name on disk."""
    from taia.derivation.models import architectures
    from taia.derivation.models import build as on_meta

    every = architectures()
    checked = 0
    for one in every if model_type == "every" else [model_type]:
        for architecture in every[one]:
            family = family_of(one, {"architectures": [architecture]})
            checked += check_names(on_meta(one, architecture), family)
    print(f"{checked:,} names")
    assert checked > 50


def check_names(model, family) -> int:
    """The place of every name against transformers' own, and live names against the model's."""
    names = names_of(model)
    for name, loaded in names:
        assert place_of(name, family).lives[0] == family.key(loaded), (type(model), name)
    for name in model.state_dict():
        assert family.live(family.key(name)) == name, (type(model), name)
    return len(names)


QUICK = [("llava", "mixtral"), ("internvl", "qwen3_moe")]
MORE = [("llava", "gpt_oss"), ("llava_onevision", "deepseek_v3"), ("idefics3", "mixtral"),
        ("blip-2", "qwen3_moe"), ("kimi_k25", "qwen3_moe"), ("fuyu", "qwen3_moe"),
        ("gemma3", "qwen3_moe"), ("llava_next", "jamba")]  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "text"), [*QUICK, *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE)]
)
def test_a_language_model_of_another_type_brings_its_own_rules(model_type, text):
    from taia.derivation.models import EXPERT_COUNTS, SMALL_TEXT
    from taia.derivation.models import build as on_meta

    made = on_meta(model_type, text_config={
        "model_type": text, **SMALL_TEXT, **dict.fromkeys(EXPERT_COUNTS, 4)})  # fmt: skip
    config = {"text_config": {"model_type": text}}
    assert check_names(made, family_of(model_type, config)) > 50


def names_of(model):
    """Every name that a file of this model may have, and the name that loading gives it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    from taia.derivation.disk import _loader, _reverted

    rules = get_model_conversion_mapping(model)
    disk = list(get_model_conversion_mapping(model, add_legacy=False))
    names = set(model.state_dict()) | set(_reverted(model, disk))
    names |= set(_reverted(model, [r for r in disk if not isinstance(r, PrefixChange)]))
    loaded = _loader([rule for rule in rules if type(rule).__name__ in KNOWN])
    return [(name, loaded(name)) for name in sorted(names)]


@pytest.mark.slow
def test_the_shipped_rules_are_those_of_the_installed_transformers():
    import transformers
    from derive_layouts import TABLE, derive, to_json

    from taia.derivation.models import architectures

    found, failed = derive(sorted(architectures()))
    assert not failed
    assert TABLE.read_text() == to_json(found, transformers.__version__)


KNOWN = {"WeightRenaming", "PrefixChange", "WeightConverter"}
