"""Tied and untied heads, resized vocabularies: what is stored, and what the config says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layout_tools import tensors, write
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import taia
from taia.cli.app import build_parser
from taia.kinds import Address, Kind
from taia.plan import strengths_of
from taia.selection import Selection

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tied_and_untied(pair):
    """(tied base, tied tuned, untied base, untied tuned) of one Llama."""
    return (*pair("llama"), *pair("llama", tie_word_embeddings=False))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


KEEPS = ["all", "none", "attention", "attention + head", "embedding + ffn*0.5"]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_tied_base_and_an_untied_tuned_model(tied_and_untied, tmp_path, keep):
    base, _, _, tuned = tied_and_untied
    check(base, tuned, tmp_path, keep)


@pytest.mark.parametrize("keep", KEEPS)
def test_an_untied_base_and_a_tied_tuned_model(tied_and_untied, tmp_path, keep):
    _, tuned, base, _ = tied_and_untied
    check(base, tuned, tmp_path, keep)


def check(base: Path, tuned: Path, tmp_path: Path, keep: str) -> None:
    """The output is what comes of two models that both store the head; its config says so."""
    untied = []
    for name, folder in (("base", base), ("tuned", tuned)):
        state = tensors(folder)
        state.setdefault(HEAD, state[EMBEDDING])
        untied.append(write(tmp_path / name, state, folder, tie_word_embeddings=False))
    taia.splice(base, tuned, tmp_path / "out", keep=keep)
    taia.verify(tmp_path / "out")
    taia.splice(*untied, tmp_path / "alike", keep=keep)
    out, alike = tensors(tmp_path / "out"), tensors(tmp_path / "alike")
    assert out.keys() == alike.keys()
    assert all(torch.equal(out[name], alike[name]) for name in out)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "alike"))
    whole = {"all": tuned, "none": base}.get(keep)
    if whole:
        assert torch.equal(logits(tmp_path / "out"), logits(whole))
    assert "tied in the" in taia.plan(base, tuned, keep).notes[0]


@pytest.mark.parametrize("side", ["base", "tuned model"])
def test_a_model_saved_without_its_head_is_not_taken_for_tied(tied_and_untied, tmp_path, side):
    _, _, base, tuned = tied_and_untied
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(base).save_pretrained(headless)
    assert config(headless)["tie_word_embeddings"] is False
    models = (headless, tuned) if side == "base" else (base, headless)
    told = taia.plan(*models, "attention").faults
    assert len(told) == 1
    assert f"{HEAD}: the {side} stores no head" in told[0]


def test_the_config_of_an_alike_pair_is_not_touched(pair, tmp_path):
    for tie in (True, False):
        base, tuned = pair("llama", tie_word_embeddings=tie)
        taia.splice(base, tuned, tmp_path / f"{tie}", keep="all - embedding - head")
        written = (tmp_path / f"{tie}" / "config.json").read_bytes()
        assert written == (tuned / "config.json").read_bytes()


def test_heads_stored_under_a_config_that_ties_them_are_untied(pair, tmp_path):
    base, tuned = pair("llama")
    both = []
    for name, folder in (("base", base), ("tuned", tuned)):
        state = tensors(folder)
        both.append(write(tmp_path / name, {**state, HEAD: state[EMBEDDING]}, folder))
    taia.splice(*both, tmp_path / "alike", keep="attention")
    assert config(tmp_path / "alike")["tie_word_embeddings"] is True
    taia.splice(*both, tmp_path / "parted", keep="attention + head")
    assert config(tmp_path / "parted")["tie_word_embeddings"] is False
    out = tensors(tmp_path / "parted")
    assert torch.equal(out[HEAD], tensors(tuned)[EMBEDDING])
    assert torch.equal(out[EMBEDDING], tensors(base)[EMBEDDING])


@pytest.mark.parametrize("tie", [True, False])
def test_a_resized_vocabulary_is_kept_whole_or_not_at_all(pair, tmp_path, tie):
    base, _ = pair("llama", tie_word_embeddings=tie)
    _, tuned = pair("llama", vocab_size=70, tie_word_embeddings=tie)
    for keep in ("attention", "all*0.5", "attention + embedding*0.5 + head*0.5"):
        with pytest.raises(taia.TaiaError, match="the vocabulary was resized"):
            taia.splice(base, tuned, tmp_path / "refused", keep=keep)
    taia.splice(base, tuned, tmp_path / "out", keep="attention + embedding + head")
    taia.verify(tmp_path / "out")
    out, old, new = (tensors(folder) for folder in (tmp_path / "out", base, tuned))
    for name, tensor in out.items():
        whole = "self_attn" in name or name in (EMBEDDING, HEAD)
        assert torch.equal(tensor, (new if whole else old)[name]), name
    assert config(tmp_path / "out")["vocab_size"] == 70
    assert logits(tmp_path / "out").shape[-1] == 70
    if not tie:
        with pytest.raises(taia.TaiaError, match=r"lm_head.weight: shapes differ"):
            taia.splice(base, tuned, tmp_path / "refused", keep="attention + embedding")


def test_a_width_that_differs_is_no_resized_vocabulary(pair, tmp_path):
    base, _ = pair("llama")
    _, tuned = pair("llama", hidden_size=16)
    with pytest.raises(taia.TaiaError) as caught:
        taia.plan(base, tuned, "all").refuse_faults()
    assert "resized" not in str(caught.value)
    assert f"{EMBEDDING}: shapes differ" in str(caught.value)


@pytest.mark.parametrize("tied_side", ["base", "tuned"])
@pytest.mark.parametrize("keep", ["all", "none", "attention", "attention + head"])
def test_configs_that_disagree_on_a_head_that_both_store(
    tied_and_untied, tmp_path, tied_side, keep
):
    """Many loaders pass over a head that a config ties: the output's must not tie it."""
    tied, _, _, untied = tied_and_untied
    head = tensors(tied)[EMBEDDING]
    both = write(tmp_path / "both", {**tensors(tied), HEAD: head}, tied)
    base, tuned = (both, untied) if tied_side == "base" else (untied, both)
    taia.splice(base, tuned, tmp_path / "out", keep=keep)
    taia.verify(tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    side = tuned if keep in ("all", "attention + head") else base
    assert torch.equal(tensors(tmp_path / "out")[HEAD], tensors(side)[HEAD])
    whole = {"all": tuned, "none": base}.get(keep)
    if whole:
        assert torch.equal(logits(tmp_path / "out"), logits(whole))


def test_a_head_among_more_that_is_tied_is_refused(tmp_path):
    """Of a T5 one setting unties the encoder's embedding and the decoder's as well."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "vocab_size": 32,
             "num_layers": 2}  # fmt: skip
    both, apart = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
        made.save_pretrained(like := tmp_path / f"{seed}")
        state = tensors(like) | {HEAD: torch.randn(32, 16)}
        both.append(write(tmp_path / f"tied{seed}", state, like, tie_word_embeddings=True))
        apart.append(write(tmp_path / f"apart{seed}", state, like, tie_word_embeddings=False))
    with pytest.raises(taia.TaiaError, match="what else it ties is not known for t5"):
        taia.splice(*both, tmp_path / "out", keep="attention + head")
    for keep in ("attention", "all", "all - embedding - head"):
        taia.splice(*both, tmp_path / "out", keep=keep, overwrite=True)
    taia.splice(*apart, tmp_path / "parted", keep="attention + head")


def test_only_a_head_of_the_language_model_is_no_tie():
    speech = Address(Kind.HEAD, None, None, "generator")
    words = Address(Kind.EMBEDDING, None, None, "language")
    there = {"speech": speech, "words": words}
    base = SimpleNamespace(text="base")
    assert strengths_of(base, there, Selection.parse("all - head"))[2]
    assert not strengths_of(base, there, Selection.parse("all - head@generator"))[2]


def test_a_decoder_that_is_deeper_than_its_encoder_lacks_nothing(tmp_path):
    """The number of layers that counts is its own; those behind the encoder's are loaded."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "vocab_size": 32}
    made = AutoConfig.for_model("t5", num_layers=1, num_decoder_layers=3, **sizes)
    AutoModelForSeq2SeqLM.from_config(made).save_pretrained(tmp_path / "base")
    state = tensors(tmp_path / "base")
    less = {name: tensor for name, tensor in state.items() if "decoder.block.2." not in name}
    write(tmp_path / "less", less, tmp_path / "base")
    faults = taia.plan(tmp_path / "base", tmp_path / "less", "attention").faults
    assert len(faults) == len(state) - len(less) > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_buffers_that_both_store_are_whole_at_every_strength(pair, tmp_path, dtype):
    """Old saves of GPT-NeoX; of a mask and of -inf there is no half."""
    models = []
    for name, folder, fill in zip(("base", "tuned"), pair("gpt_neox"), (0, 1), strict=True):
        state = tensors(folder)
        attention = "gpt_neox.layers.0.attention"
        state[f"{attention}.bias"] = torch.full((1, 1, 8, 8), fill).to(dtype)
        state[f"{attention}.masked_bias"] = torch.tensor(-torch.inf, dtype=torch.float16)
        state[f"{attention}.rotary_emb.inv_freq"] = torch.full((4,), float(fill))
        models.append(write(tmp_path / name, state, folder))
    stored = [tensors(folder) for folder in models]
    buffers = stored[0].keys() - tensors(pair("gpt_neox")[0]).keys()
    assert len(buffers) == 3
    for keep, side in {
        "attention*0.5": 0,
        "attention.q": 0,
        "none": 0,
        "all*1.5": 0,
        "all": 1,
    }.items():
        out = tmp_path / keep
        taia.splice(*models, out, keep)
        taia.verify(out)
        for name in buffers:
            assert torch.equal(tensors(out)[name], stored[side][name]), (keep, name)


def test_settings_that_differ_are_told(pair, tmp_path, capsys):
    base, tuned = pair("llama")
    state = tensors(tuned)
    other = write(tmp_path / "other", state, tuned, hidden_act="gelu", pad_token_id=3)
    (note,) = taia.plan(base, other, "attention").notes
    assert "hidden_act ('silu' and 'gelu')" in note
    assert "pad_token_id" not in note
    told = []
    taia.splice(base, other, tmp_path / "out", on_note=told.append)
    assert told == [note]
    words = ["splice", str(base), str(other), str(tmp_path / "again"), "--json"]
    options = build_parser().parse_args(words)
    options.do(options)
    said = capsys.readouterr()
    assert said.err.endswith(f"note: {note}\n")
    assert json.loads(said.out)["selection"] == "attention"
    assert taia.plan(base, other, "all").notes == ()
    assert taia.plan(base, tuned, "attention").notes == ()
