"""The authors' layout, written here as their training writes it, and read back as ours."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from chat_tools import tiny_chat_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import taia
from taia.errors import CheckpointError, SourceError
from taia.load import load_model
from taia.molora import register
from taia.training.molora_authors import convert

EXPERTS, CHOSEN, RANK, ALPHA = 3, 2, 2, 6
IDS = torch.arange(30).reshape(2, 15) * 8


class TheirLayer(nn.Module):
    """A linear layer with their names: `experts.E.lora_A_E`, `lora_B_E`, and a `switch`."""

    def __init__(self, base: nn.Linear, experts: int, rank: int = RANK, alpha: float = ALPHA):
        super().__init__()
        self.weight, self.scale, width = base.weight, alpha / rank, base.in_features
        if experts > 1:
            self.switch = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    f"lora_A_{e}": nn.Linear(width, rank, bias=False),
                    f"lora_B_{e}": nn.Linear(rank, base.out_features, bias=False),
                }
            )
            for e in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base's result, and of each token the experts with the largest logits."""
        result = nn.functional.linear(x, self.weight)
        changes = [pair[f"lora_B_{e}"](pair[f"lora_A_{e}"](x)) * self.scale
                   for e, pair in enumerate(self.experts)]  # fmt: skip
        if len(changes) == 1:
            return result + changes[0]
        best, which = self.switch(x).topk(CHOSEN, dim=-1)
        shares = best.softmax(-1)
        for rank in range(CHOSEN):
            for e, change in enumerate(changes):
                result = result + change * (shares * (which == e))[..., rank : rank + 1]
        return result


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"), dtype="float32")


def their_folder(base, folder, experts=EXPERTS, pickled=False, **settings):
    """Write a folder in their layout; the logits of the model that it is of."""
    torch.manual_seed(4)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"])
    model = get_peft_model(load_model(base, dtype="float32"), lora)
    for layer in model.base_model.model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, TheirLayer(getattr(layer.mlp, name), experts))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "switch" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if pickled:
        from safetensors.torch import load_file

        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
    mixture = {n: p.data for n, p in model.named_parameters() if re.search("experts|switch", n)}
    torch.save(mixture, folder / "non_lora_trainables.bin")
    fields = {"num_experts": experts, "num_experts_per_token": CHOSEN, "molora_r": RANK}
    fields |= {"molora_alpha": ALPHA, "share_expert": False}
    (folder / "config.json").write_text(json.dumps(fields | settings))
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("experts", [1, EXPERTS])
def test_the_converted_adapter_is_their_model(experts, pickled, base, tmp_path):
    register()
    chosen = min(CHOSEN, experts)
    settings = {"num_experts_per_token": chosen}
    theirs = their_folder(base, tmp_path / "theirs", experts, pickled, **settings)
    out = convert(tmp_path / "theirs", tmp_path / "ours")
    model = PeftModel.from_pretrained(load_model(base, dtype="float32"), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs)
    taia.slice_adapter(out, tmp_path / "attention", "attention", base=base)
    stored = json.loads((tmp_path / "attention" / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["target_modules"]) == (
        "LORA",
        [f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in ("o", "q")],
    )


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("trapped",))


def test_a_pickle_with_code_is_not_run(base, tmp_path, capsys):
    their_folder(base, tmp_path / "theirs")
    (tmp_path / "theirs" / "non_lora_trainables.bin").write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(CheckpointError, match="other things than tensors"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert "trapped" not in capsys.readouterr().out
    assert not (tmp_path / "ours").exists()


MIXTURE = "base_model.model.model.layers.0.mlp.up_proj"
FAULTS = {
    "neither an expert nor a switch": lambda s: s | {"model.norm.weight": torch.ones(3)},
    "experts A [0, 2]": lambda s: {n: t for n, t in s.items() if "up_proj.experts.1" not in n},
    "differ in shape": lambda s: s | {f"{MIXTURE}.experts.1.lora_A_1.weight": torch.ones(5, 32)},
    "a switch without experts": lambda s: s | {"x.switch.weight": torch.ones(3, 32)},
    "not a table of named tensors": lambda s: list(s.values()),
    "not of rank 2": lambda s: {
        n: torch.cat([t, t], dim=0 if "lora_A" in n else 1) if "lora_" in n else t
        for n, t in s.items()
    },
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_broken_folder_is_told(said, base, tmp_path):
    folder = tmp_path / "theirs"
    their_folder(base, folder)
    stored = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save(FAULTS[said](stored), folder / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "ours")
    assert said in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_other_kinds_of_mixture_and_folders_are_refused(base, tmp_path):
    folder = tmp_path / "theirs"
    their_folder(base, folder, share_expert=True)
    with pytest.raises(SourceError, match="share_expert"):
        convert(folder, tmp_path / "ours")
    their_folder(base, folder, num_experts_per_token=None)
    with pytest.raises(SourceError, match="give experts_per_token"):
        convert(folder, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="more than the 3 experts"):
        convert(folder, tmp_path / "ours", experts_per_token=4)
    assert convert(folder, tmp_path / "ours", experts_per_token=2).is_dir()
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(SourceError, match="authors' layout"):
        convert(folder, tmp_path / "more")
