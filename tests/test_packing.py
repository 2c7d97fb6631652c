"""Packing: the same loss and gradients as padded batches, fewer tokens, no neighbour seen."""

from __future__ import annotations

import json
import random

import pytest
import torch
from chat_tools import tiny_chat_model
from conftest import build
from hypothesis import given
from hypothesis import strategies as st

from taia.errors import RecipeError
from taia.training.batches import collate
from taia.training.callbacks import read_log
from taia.training.finetune import finetune
from taia.training.packing import IS_TOKEN, Packing, collate_packed, packing_for, require_packing
from taia.training.spans import IGNORED

SAME = {"batch_size": 8, "learning_rate": 1e-2, "rank": 2, "max_length": 64, "dropout": 0.0}
SAME |= {"dtype": "float32"}
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=20)


def examples(lengths=(3, 9, 20, 7, 14, 1), prompt=0):
    """Random examples; the first `prompt` tokens of each have no label."""
    pace = random.Random(0)
    rows = [[pace.randrange(3, 64) for _ in range(length)] for length in lengths]
    return [
        {"input_ids": row, "labels": ([IGNORED] * prompt + row[prompt:])[: len(row)]}
        for row in rows
    ]


def losses_and_gradients(model, batch):
    """The summed loss of a batch, and its gradients."""
    batch = {name: value for name, value in batch.items() if name != IS_TOKEN}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@given(LENGTHS, st.integers(1, 900), st.booleans())
def test_every_example_is_in_one_row_and_rows_cost_no_more(lengths, width, one_row):
    packing = Packing(width, one_row)
    rows = packing.rows(lengths)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    tokens = packing.tokens(lengths)
    assert sum(lengths) <= tokens <= len(lengths) * max(lengths)
    if one_row:
        assert tokens == sum(lengths)


def test_attention_is_paid_for():
    """Narrow models take short rows, wide ones long rows."""
    lengths = [100, 90, 80, 70] * 4
    assert Packing(8).tokens(lengths) > Packing(10_000).tokens(lengths)
    assert len(Packing(8).rows(lengths)) > len(Packing(10_000).rows(lengths))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("prompt", [0, 2])
def test_packed_batches_have_the_loss_of_padded_ones(model_type, prompt):
    model, rows = build(model_type, 0), examples(prompt=prompt)
    require_packing(model)
    plain, gradients = losses_and_gradients(model, collate(rows, 0))
    for packing in (packing_for(model.config), Packing(32, one_row=True)):
        packed = collate_packed(rows, 0, packing)
        assert packed["input_ids"].numel() < 6 * 20
        assert int(packed[IS_TOKEN].sum()) == 54
        loss, again = losses_and_gradients(model, packed)
        torch.testing.assert_close(loss, plain)
        for ours, theirs in zip(again, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_row_for_flash_attention():
    model = build("llama", 0)
    assert not packing_for(model.config).one_row
    model.config._attn_implementation = "flash_attention_2"
    assert packing_for(model.config).one_row


def small(model_type, **fields):
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32}
    config = AutoConfig.for_model(model_type, **common | fields)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "told"), [("bloom", "numbers positions"), ("falcon", "see the one before")]
)
def test_models_that_cannot_are_told_by_running_them(model_type, told):
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    heads = {"n_head": 4} if model_type == "bloom" else {"num_attention_heads": 4}
    with pytest.raises(RecipeError, match=told):
        require_packing(small(model_type, **heads, **ends))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    rows = [{"instruction": f"{n}?", "output": "yes " * (n % 9 + 1)} for n in range(22)]
    rows += [{"text": f"passage {n}"} for n in range(4)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_chat_model(folder / "base", dtype="float32"), folder / "chats.jsonl"


def logged(out, names):
    return [[line[name] for name in names] for line in read_log(out / "log.jsonl")]


@pytest.mark.slow
def test_a_packed_run_has_the_curve_of_a_padded_one(places, tmp_path):
    """With routers that pass over the filling, and KL, whose reference is packed as well."""
    options = SAME | {"method": "molora", "balance": 0.1, "penalty": {"kl": 0.5, "l2": 0.01}}
    for name, packing in (("plain", False), ("packed", True)):
        finetune(*places, tmp_path / name, packing=packing, **options)
    told = ["loss", "task_loss", "kl", "l2", "balance", "router_entropy", "router_load_max"]
    plain, packed = (logged(tmp_path / name, told) for name in ("plain", "packed"))
    assert packed == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in plain]
    assert logged(tmp_path / "plain", ["tokens"]) == logged(tmp_path / "packed", ["tokens"])
    facts = [json.loads((tmp_path / n / "train.json").read_text()) for n in ("plain", "packed")]
    shares = [fact["throughput"]["padding"] for fact in facts]
    assert 0 < shares[1] < shares[0]
    for fact in facts:
        rates = fact["throughput"]
        assert rates["tokens_per_second"] == pytest.approx(
            rates["padded_tokens_per_second"] * (1 - rates["padding"]), rel=1e-3
        )


@pytest.mark.slow
def test_a_packed_run_resumes_bit_for_bit(places, tmp_path):
    from safetensors.torch import load_file

    class StopError(Exception):
        pass

    def stop(line):
        if line["step"] == 3:
            raise StopError

    options = SAME | {"packing": True, "dropout": 0.1, "save_steps": 2}
    whole = finetune(*places, tmp_path / "whole", **options)
    with pytest.raises(StopError):
        finetune(*places, tmp_path / "cut", on_progress=stop, **options)
    with pytest.raises(RecipeError, match="packing: True before, False now"):
        finetune(*places, tmp_path / "cut", resume=True, **options | {"packing": False})
    cut = finetune(*places, tmp_path / "cut", resume=True, **options)
    one, two = (load_file(run.out / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_dry_run_tells_the_padding_of_both(places):
    from taia.training.preview import preview

    told = preview(*places, batch_size=8, max_length=64)
    assert 0 <= told.padding["packed"] < told.padding["plain"] < 1
    assert f"padding: {told.padding['plain']:.1%}" in str(told)
    assert told.as_json()["padding"] == told.padding
