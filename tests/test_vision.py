"""Vision-language models, whose files have other names than the modules that PEFT sees."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from adapter_tools import close
from layout_tools import rewrite, tensors, write
from peft import PeftModel
from transformers import AutoModelForCausalLM
from vision_tools import FAMILIES, build, language_linears, load, logits, train

import taia
from taia.ends import TIE

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
TEXT = "attention@language + ffn@language + norm@language"
QUICK = {"qwen2_vl", "gemma3"}
EVERY = [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function model_type -> folders of a base, of a tuned model, and of a full LoRA."""
    made = {}

    def make(model_type):
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            for name, seed in (("base", 0), ("tuned", 1)):
                build(model_type, seed).save_pretrained(root / name)
            model = load(root / "base")
            train(model, language_linears(model, (*ATTENTION, *FFN)), root / "lora",
                  target_parameters=experts(model))  # fmt: skip
            made[model_type] = root / "base", root / "tuned", root / "lora"
        return made[model_type]

    return make


def experts(model):
    """The parameters that hold all experts of a layer; none of most models."""
    return [name for name, _ in model.named_parameters() if "experts." in name] or None


def attached(base, adapter):
    """The base with an adapter that finds all of its modules, and brings none besides."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        model = PeftModel.from_pretrained(load(base), adapter).eval()
    stored = {name.removesuffix(".weight") for name in tensors(adapter) if ".lora_" in name}
    live = {
        name.removesuffix(".default.weight").removesuffix(".default")
        for name in model.state_dict() if ".lora_" in name
    }  # fmt: skip
    assert stored == live
    return model


def only(model, kinds):
    """A PEFT model with the factors of all other modules at nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kinds_in = (*kinds, "experts") if "up_proj" in kinds else kinds
            if "lora_B" in name and not any(f".{kind}." in name for kind in kinds_in):
                parameter.zero_()
    return model


def same(ours, theirs, **close_to):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        told = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(tensor, theirs[name], msg=told, **close_to)


@pytest.mark.parametrize("model_type", EVERY)
def test_a_slice_is_the_adapter_with_that_part_alone(saved, tmp_path, model_type):
    base, _, lora = saved(model_type)
    for keep, kinds in (("attention", ATTENTION), ("ffn", FFN), ("attention.q", ("q_proj",))):
        taia.splice(base, lora, tmp_path / keep, keep)
        taia.verify(tmp_path / keep)
        expected = logits(only(attached(base, lora), kinds))
        assert close(logits(attached(base, tmp_path / keep)), expected), keep
        assert not close(expected, logits(load(base))), keep


@pytest.mark.parametrize("model_type", EVERY)
def test_a_merge_is_that_of_peft(saved, tmp_path, model_type):
    base, _, lora = saved(model_type)
    for keep, kinds in (("all", ATTENTION + FFN), ("attention", ATTENTION)):
        taia.splice(base, lora, tmp_path / keep, keep, merge=True)
        taia.verify(tmp_path / keep)
        merged = only(attached(base, lora), kinds).merge_and_unload()
        same(load(tmp_path / keep).state_dict(), merged.state_dict(), atol=1e-6, rtol=1e-5)
        assert tensors(tmp_path / keep).keys() == tensors(base).keys()


@pytest.mark.parametrize("model_type", EVERY)
def test_short_targets_take_the_towers_too(saved, tmp_path, model_type):
    """`q_proj` names modules of the vision tower as well, where it has some of that name."""
    base, _, _ = saved(model_type)
    peft = train(load(base), ["q_proj", "v_proj"], tmp_path / "lora")
    taia.splice(base, tmp_path / "lora", tmp_path / "all", "all", merge=True)
    merged = peft.merge_and_unload().state_dict()
    same(load(tmp_path / "all").state_dict(), merged, atol=1e-6, rtol=1e-5)
    taia.splice(base, tmp_path / "lora", tmp_path / "text", "attention@language")
    expected = attached(base, tmp_path / "lora")
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if "lora_B" in name and ("vision" in name or "visual" in name):
                parameter.zero_()
    assert close(logits(attached(base, tmp_path / "text")), logits(expected))


@pytest.mark.parametrize("model_type", EVERY)
@pytest.mark.parametrize("keep", ["attention", TEXT])
def test_an_extracted_adapter_is_the_splice(saved, tmp_path, model_type, keep):
    base, tuned, _ = saved(model_type)
    extraction = taia.extract(base, tuned, tmp_path / "adapter", None, keep)
    assert extraction.error < 1e-5
    taia.verify(tmp_path / "adapter")
    taia.splice(base, tuned, tmp_path / "spliced", keep)
    model = attached(base, tmp_path / "adapter")
    expected = load(tmp_path / "spliced").state_dict()
    same(model.merge_and_unload().state_dict(), expected, atol=1e-4, rtol=1e-4)
    errors = [taia.extract(base, tuned, tmp_path / f"{r}", r, keep).error for r in (1, 4)]
    deltas = [distance(base, tmp_path / f"{r}", expected) for r in (1, 4)]
    assert deltas == pytest.approx(errors, rel=1e-3)


def distance(base, adapter, expected):
    """How far the base with an adapter is from a model, relative to what the model changed."""
    before, after = load(base).state_dict(), attached(base, adapter).merge_and_unload().state_dict()
    matrices = [name for name in expected if expected[name].ndim == 2]
    lost = sum((after[n] - expected[n]).square().sum() for n in matrices)
    return float((lost / sum((before[n] - expected[n]).square().sum() for n in matrices)).sqrt())


@pytest.mark.parametrize("model_type", EVERY)
def test_two_layouts_are_one_model(saved, tmp_path, model_type):
    """The names in memory against those of the first release, which save_pretrained writes."""
    base, tuned, lora = saved(model_type)
    state = load(tuned).state_dict()
    if not any(name.endswith("lm_head.weight") for name in tensors(tuned)):
        del state["lm_head.weight"]
    moved = write(tmp_path / "moved", state, tuned)
    for keep in ("all", "none", "attention@language", "all - ffn"):
        taia.splice(base, moved, tmp_path / "out", keep, overwrite=True)
        taia.verify(tmp_path / "out")
        taia.splice(base, tuned, tmp_path / "alike", keep, overwrite=True)
        same(tensors(tmp_path / "out"), tensors(tmp_path / "alike"), atol=0, rtol=0)
        taia.splice(moved, base, tmp_path / "back", keep, overwrite=True)
        taia.splice(tuned, base, tmp_path / "alike", keep, overwrite=True)
        theirs = load(tmp_path / "alike").state_dict()
        same(load(tmp_path / "back").state_dict(), theirs, atol=0, rtol=0)
    taia.splice(moved, lora, tmp_path / "merged", "attention", merge=True)
    taia.splice(tuned, lora, tmp_path / "merged-alike", "attention", merge=True)
    theirs = load(tmp_path / "merged-alike").state_dict()
    same(load(tmp_path / "merged").state_dict(), theirs, atol=0, rtol=0)


@pytest.mark.parametrize("model_type", EVERY)
def test_an_adapter_of_an_older_release_is_placed_alike(saved, tmp_path, model_type):
    """Its modules have the names of the file, as transformers had them in memory then."""
    from safetensors.torch import load_file, save_file

    base, _, lora = saved(model_type)
    old = tmp_path / "old"
    old.mkdir()
    config = (lora / "adapter_config.json").read_text()
    factors = load_file(lora / "adapter_model.safetensors")
    layers = "model.language_model.layers."
    first = next(n for n in tensors(base) if n.endswith("layers.0.self_attn.q_proj.weight")
                 and "vision" not in n and "visual" not in n)  # fmt: skip
    stem = first.removesuffix("0.self_attn.q_proj.weight")
    (old / "adapter_config.json").write_text(config.replace(layers, stem))
    renamed = {name.replace(layers, stem): tensor for name, tensor in factors.items()}
    save_file(renamed, old / "adapter_model.safetensors", {"format": "pt"})
    for name, adapter in (("new", lora), ("out", old)):
        taia.splice(base, adapter, tmp_path / name, "attention", merge=True)
    same(tensors(tmp_path / "out"), tensors(tmp_path / "new"), atol=0, rtol=0)


def test_whole_modules_of_an_adapter_are_placed_too(saved, tmp_path):
    """Head and embedding saved along: of a LLaVA `language_model.lm_head` in the file."""
    base, _, _ = saved("llava")
    settings = {"modules_to_save": ["lm_head", "embed_tokens"]}
    peft = train(load(base), ["q_proj"], tmp_path / "lora", **settings)
    for keep in ("all", "head + embedding"):
        taia.splice(base, tmp_path / "lora", tmp_path / keep, keep, merge=True)
    merged = peft.merge_and_unload().state_dict()
    same(load(tmp_path / "all").state_dict(), merged, atol=1e-6, rtol=1e-5)
    ends = load(tmp_path / "head + embedding").state_dict()
    before = load(base).state_dict()
    for name, tensor in ends.items():
        end = name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
        assert torch.equal(tensor, (merged if end else before)[name]), name


def test_the_deltas_of_an_adapter_are_those_of_its_merge(saved, tmp_path):
    from taia.analysis.deltas import delta_norms

    base, _, lora = saved("qwen2_5_vl")
    taia.splice(base, lora, tmp_path / "merged", "all", merge=True)
    moved = write(tmp_path / "moved", load(tmp_path / "merged").state_dict(), base)
    norms = [
        {(row.kind, row.projection, row.layer): row.norm for row in delta_norms(base, other)
         if row.norm > 0}
        for other in (lora, tmp_path / "merged", moved)
    ]  # fmt: skip
    assert norms[0]
    for others in norms[1:]:
        assert others == pytest.approx(norms[0], rel=1e-3)


def test_names_of_the_first_llava(saved, tmp_path):
    """Its tower was one module deeper than transformers stores it today."""
    base, tuned, _ = saved("llava")
    deeper = ("vision_tower.", "vision_tower.vision_model.")
    first = rewrite(base, tmp_path / "first", lambda name: name.replace(*deeper))
    for keep in ("all - ffn", "attention"):
        taia.splice(first, tuned, tmp_path / f"first-{keep}", keep)
        taia.splice(base, tuned, tmp_path / keep, keep)
        theirs = load(tmp_path / keep).state_dict()
        same(load(tmp_path / f"first-{keep}").state_dict(), theirs, atol=0, rtol=0)
        taia.extract(first, tuned, tmp_path / f"lora-{keep}", None, "attention")
        attached(first, tmp_path / f"lora-{keep}")


def test_an_extraction_without_known_names_is_refused(saved, tmp_path, monkeypatch):
    """PEFT passes over factors that name no module, and runs the base."""
    base, tuned, _ = saved("qwen2_vl")
    monkeypatch.setattr("taia.targets.is_known", lambda _: False)
    with pytest.raises(taia.TaiaError, match="its name in the running model, which is not known"):
        taia.extract(base, tuned, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_the_language_model_alone_fits_the_whole(tmp_path):
    """AutoModelForCausalLM leaves the towers out, and calls the rest by other names."""
    build("qwen3_5", 0).save_pretrained(tmp_path / "base")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert any(name.startswith("model.layers.") for name in text.state_dict())
    peft = train(text, ["q_proj", "o_proj"], tmp_path / "lora")
    taia.splice(tmp_path / "base", tmp_path / "lora", tmp_path / "out", merge=True)
    assert close(logits(load(tmp_path / "out")), logits(peft))
    taia.splice(tmp_path / "base", tmp_path / "lora", tmp_path / "sliced", "attention.q")


@pytest.mark.parametrize("model_type", EVERY)
@pytest.mark.parametrize("ties", [(True, False), (False, True), (True, True)])
def test_tied_and_untied_heads(tmp_path, model_type, ties):
    """(True, True): both configs tie a head that both store all the same."""
    folders, heads = [], []
    for seed, tie in enumerate(ties):
        stored = tie and ties != (True, True)
        text = FAMILIES[model_type]["text_config"] | {TIE: stored}
        model = build(model_type, seed, text_config=text, **{TIE: stored})
        model.save_pretrained(folder := tmp_path / f"{seed}")
        heads.append(model.get_output_embeddings().weight)
        if ties == (True, True):
            setting = {TIE: True, "text_config": model.config.text_config.to_dict() | {TIE: True}}
            folder = write(tmp_path / f"both{seed}", tensors(folder), folder, **setting)
        folders.append(folder)
    for keep in ("attention + head", "all - head"):
        taia.splice(*folders, tmp_path / keep, keep)
        taia.verify(tmp_path / keep)
        assert torch.equal(load(tmp_path / keep).get_output_embeddings().weight, heads["+" in keep])


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_of_another_model_is_still_refused(saved, pair, tmp_path, merge):
    _, _, lora = saved("llava")
    base, _ = pair("llama")
    with pytest.raises(taia.TaiaError, match="made for another model"):
        taia.splice(base, lora, tmp_path / "out", merge=merge)
