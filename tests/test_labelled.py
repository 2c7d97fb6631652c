"""Logits at the labelled places alone: the loss and the gradients of all of them."""

import pytest
import torch
from conftest import build

from taia.training.labelled import at_labels, can_choose_places, keep_input_dtype
from taia.training.spans import IGNORED
from taia.training.trainable import add_lora

FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt2", "mixtral", "phi3")


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(2, 26).reshape(2, 12)
    labels = ids.clone()
    labels[0, :7] = labels[1, :9] = labels[0, 10:] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: one.grad for name, one in named if one.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_places(family):
    model = build(family, seed=1).train(False)
    assert can_choose_places(model)
    whole, all_gradients = gradients(model, batch())
    chosen, few_gradients = gradients(model, at_labels(batch()))
    torch.testing.assert_close(chosen, whole)
    assert few_gradients.keys() == all_gradients.keys()
    for name, one in few_gradients.items():
        torch.testing.assert_close(one, all_gradients[name], msg=name)


def test_only_the_needed_places_are_computed():
    inputs = at_labels(batch())
    assert inputs["logits_to_keep"].tolist() == [6, 7, 8, 9, 10]
    assert build("llama", seed=1)(**inputs).logits.shape[:2] == (2, 5)
    nothing = batch() | {"labels": torch.full((2, 12), IGNORED)}
    assert at_labels(nothing)["shift_labels"].tolist() == [[IGNORED]] * 2


def test_lora_under_autocast_needs_no_wider_input():
    """Without dropout the product is the same, bit for bit."""
    model = add_lora(build("llama", seed=1).bfloat16(), "all", rank=2, alpha=4, dropout=0.0)
    torch.manual_seed(0)
    for name, one in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual = model(**batch()).logits
        keep_input_dtype(model)
        torch.testing.assert_close(model(**batch()).logits, usual, rtol=0, atol=0)
