"""The base model made ready to train: what is trained in it, and what holds it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taia.load import load_model
from taia.selection import Selection
from taia.sources import Form
from taia.training.data import encode_all, read_chats
from taia.training.fisher import Fisher, cached_fisher
from taia.training.labelled import keep_input_dtype
from taia.training.objective import Additions
from taia.training.penalties import frozen_copy
from taia.training.settings import Settings
from taia.training.trainable import add_lora, freeze_rest, trained_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Ready", "make_ready"]


@dataclass(frozen=True, slots=True)
class Ready:
    """The model with its trainable parameters set, and the dtype that the base is stored in.

    `facts` go into train.json: where the Fisher information lies, and what the penalties take
    in memory or on disk, in bytes.
    """

    model: PreTrainedModel
    stored_dtype: torch.dtype
    additions: Additions
    facts: dict[str, Any]

    @property
    def fisher_name(self) -> str | None:
        """The name of the Fisher information, which tells its content."""
        fisher = self.additions.fisher
        return fisher.path.parent.name if isinstance(fisher, Fisher) else None


def make_ready(settings: Settings, form: Form, tokenizer: PreTrainedTokenizerBase) -> Ready:
    """Load the base and set up what `settings` train and penalise."""
    from transformers import set_seed

    train, full = str(Selection.parse(settings.train)), settings.method == "full"
    examples = None
    if settings.fisher_data is not None:
        chats = read_chats(settings.fisher_data, max_examples=settings.fisher_examples)
        examples = encode_all(chats, tokenizer, settings.max_length).examples
    stored = "bfloat16" if form is Form.GGUF else "auto"
    model = load_model(settings.base, dtype=stored if full else settings.dtype)
    dtype = model.dtype
    information: Fisher | None = None
    if examples is not None:
        weights = trained_weights(model, train, settings.method)
        information = cached_fisher(model, examples, weights)
    set_seed(settings.seed)
    copy = None
    if full:
        model = model.float()
        freeze_rest(model, train)
        if settings.penalty:
            copy = frozen_copy(model, dtype)
    else:
        model = _with_adapter(model, train, settings)
        if settings.dtype == "bfloat16" and settings.method in {"lora", "molora"}:
            keep_input_dtype(model)  # training runs under autocast then
    model.config.use_cache = False
    facts: dict[str, Any] = {}
    if information is not None:
        facts["fisher"] = str(information.path)
        facts["fisher_bytes"] = information.path.stat().st_size
    if copy is not None:
        facts["frozen_copy_bytes"] = sum(tensor.nbytes for tensor in copy.values())
    additions = Additions(settings.penalty, settings.balance, copy, information)
    return Ready(model.train(), dtype, additions, facts)


def _with_adapter(model: PreTrainedModel, train: str, settings: Settings) -> PreTrainedModel:
    mixture = None
    if settings.method == "molora":
        mixture = {
            "experts": settings.experts,
            "experts_per_token": settings.experts_per_token,
            "expert_dropout": settings.expert_dropout,
        }
    return add_lora(
        model,
        train,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        dora=settings.method == "dora",
        mixture=mixture,
    )
