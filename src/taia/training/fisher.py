"""The diagonal Fisher information of a base model: how much each weight matters to it.

    F = mean over examples of (gradient of log p(answer | prompt))^2

with the answers of the data (the empirical Fisher) and the log-likelihood of all the
assistant's tokens of an example together. Examples go through one at a time, so that the
gradients are an example's own; each gradient is squared, added to F and freed as soon as it is
there.

F is stored in the cache ($TAIA_CACHE, else ~/.cache/taia) as float32 safetensors, under a hash
of the weights, the examples and nothing else, and is used again where these are the same. It
takes 4 bytes for each weight in memory while it is made, and on disk; in training it is read
from there one matrix at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taia.errors import CheckpointError, OutputError
from taia.files import staged_folder
from taia.training.data import Example
from taia.training.spans import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Fisher", "cached_fisher", "fisher"]

FILE = "fisher.safetensors"


class Fisher:
    """A stored Fisher information: `fisher(weight)` is the tensor of one weight, float32."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable Fisher information: {error}") from error

    def __call__(self, weight: str) -> Tensor:
        """F of one weight, in its shape."""
        tensor: Tensor = self._file.get_tensor(weight)  # type: ignore[no-untyped-call]
        return tensor


def fisher(
    model: PreTrainedModel, examples: Iterable[Example], weights: Sequence[str]
) -> dict[str, Tensor]:
    """F of the named parameters, float32, each in its shape. The model is left as it was."""
    import torch

    wanted = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    assert wanted.keys() == set(weights)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in wanted.items()}
    flags = {p: p.requires_grad for p in model.parameters()}
    training, count = model.training, 0
    model.eval().requires_grad_(False)
    handles = []
    for name, parameter in wanted.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(_square_into(totals[name])))
    try:
        for example in examples:
            _log_likelihood(model, example).backward()
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)
    return {name: total / count for name, total in totals.items()}


def cached_fisher(
    model: PreTrainedModel, examples: Sequence[Example], weights: Sequence[str]
) -> Fisher:
    """F from the cache, made and stored there first where it is not."""
    from safetensors.torch import save_file

    cache = Path(os.environ.get("TAIA_CACHE") or "~/.cache/taia").expanduser()
    path = cache / "fisher" / _key(model, examples, weights) / FILE
    if not path.is_file():
        made = {name: value.cpu() for name, value in fisher(model, examples, weights).items()}
        try:
            with staged_folder(path.parent) as folder:
                save_file(made, folder / FILE)
        except OutputError:
            if not path.is_file():  # else another process was first: the same numbers
                raise
    return Fisher(path)


def _square_into(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad.float().square())
        parameter.grad = None

    return add


def _log_likelihood(model: PreTrainedModel, example: Example) -> Tensor:
    import torch

    ids = torch.tensor([example["input_ids"]], device=model.device)
    labels = torch.tensor(example["labels"][1:], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    negative = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=IGNORED, reduction="sum"
    )
    return -negative


def _key(model: PreTrainedModel, examples: Sequence[Example], weights: Sequence[str]) -> str:
    """A hash of everything that F is made from."""
    import torch

    digest = hashlib.sha256(json.dumps([sorted(weights), list(examples)]).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
