"""What the machine offers a training run: processes, precision, attention, fused kernels.

Chosen by what is there, told in one line, and recorded in train.json. The numbers of a step do
not depend on the choice beyond rounding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from taia.errors import RecipeError
from taia.training.ranks import world
from taia.training.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Device", "choose_device"]


@dataclass(frozen=True, slots=True)
class Device:
    """What a run computes on. `liger`: fused kernels of the package liger-kernel."""

    name: str
    processes: int
    dtype: str
    attention: str
    liger: bool

    @property
    def cuda(self) -> bool:
        """Whether there is a CUDA device."""
        return self.name != "cpu"

    def facts(self) -> dict[str, Any]:
        """For train.json."""
        return {"device": asdict(self)}

    def __str__(self) -> str:
        several = f", {self.processes} processes" if self.processes > 1 else ""
        liger = ", liger kernels" if self.liger else ""
        return f"{self.name}{several}: {self.dtype}, {self.attention} attention{liger}"


SHORT = 256
"""Tokens of a row up to which plain matrix products beat the fused attention of a CPU: the way
back through it costs several times the way there (a seventh of a step of a model of 135M)."""


def choose_device(settings: Settings, model: PreTrainedModel, longest: int) -> Device:
    """The best that is there for `settings`; the model's attention is set to it.

    `longest`: tokens of the longest row. On a CPU short rows take plain (eager) attention.
    FlashAttention needs a GPU, bfloat16 and the package flash-attn. Liger kernels need a GPU and
    liger-kernel; they compute the loss without logits, so not where a penalty needs these.
    Raises RecipeError for a GPU that cannot compute in the dtype.
    """
    import torch

    if not torch.cuda.is_available():
        if longest <= SHORT and not settings.packing:
            model.set_attn_implementation("eager")
        return Device("cpu", world(), settings.dtype, _attention(model), liger=False)
    if settings.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise RecipeError("dtype bfloat16: this CUDA device cannot compute in it; use float32")
    supports = getattr(model, "_supports_flash_attn", False)
    if settings.dtype == "bfloat16" and supports and find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
    liger = find_spec("liger_kernel") is not None and "kl" not in settings.penalty
    name = torch.cuda.get_device_name()
    return Device(name, world(), settings.dtype, _attention(model), liger=liger)


def _attention(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "eager")
