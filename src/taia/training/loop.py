"""transformers' Trainer, set up so that nothing that matters is left to its defaults."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import RecipeError, nearest
from taia.training.batches import collate, longest_row, micro_batch
from taia.training.data import Example
from taia.training.device import choose_device
from taia.training.objective import Additions, make_trainer_class
from taia.training.packing import Packing, collate_packed
from taia.training.ranks import rank, world
from taia.training.settings import Settings
from taia.training.spans import IGNORED
from taia.training.validation import LOSS, make_validating

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

__all__ = ["check_trackers", "make_trainer", "run_trainer", "shares_of"]


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker that transformers does not know, or is not installed."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    there, known = get_available_reporting_integrations(), sorted(INTEGRATION_TO_CALLBACK)
    faults = [
        f"{name}: its package is not installed" if name in known
        else f"{name!r}: not known; there are {', '.join(known)}" + nearest(name, known)
        for name in names if name not in there
    ]  # fmt: skip
    if faults:
        raise RecipeError("report_to: this run cannot be reported there", faults)


def make_trainer(
    model: PreTrainedModel,
    examples: Sequence[Example],
    settings: Settings,
    checkpoints: Path,
    *,
    padding: int,
    save_steps: int,
    additions: Additions,
    packing: Packing | None = None,
    validation: Sequence[Example] = (),
    report_to: Sequence[str] = (),
) -> Trainer:
    """A Trainer that goes through `examples` once, in the order given.

    `padding`: the token id that fills short rows. `additions`: what the loss has beside the
    task's. `packing`: if given, several examples stand in a row. With `validation` the best
    checkpoint is loaded at the end. `report_to`: the Trainer's trackers. Raises RecipeError when
    the batch cannot be shared out among the processes.
    """
    from transformers import EarlyStoppingCallback, set_seed
    from transformers.trainer_callback import PrinterCallback

    examples = _filled(examples, settings.batch_size, padding)
    kind = make_trainer_class(additions)
    arguments = _arguments(model, examples, settings, checkpoints, save_steps)
    arguments.report_to = list(report_to)
    collator = functools.partial(collate, padding=padding)
    if packing is not None:
        collator = functools.partial(collate_packed, padding=padding, packing=packing)
    if validation:
        kind = make_validating(kind, validation, padding)
    with _tensorboard_in(checkpoints.parent / "tensorboard"):
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=examples,
            eval_dataset=validation or None,
            data_collator=collator,
        )
    if settings.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    trainer.remove_callback(PrinterCallback)
    if rank():
        set_seed(settings.seed + rank())  # else all processes would drop out the same places
    return trainer


def run_trainer(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from `checkpoint` if there is one. Raises RecipeError when memory runs out."""
    import torch

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            "the device has not enough memory for this batch; set per_device_batch_size "
            "(--per-device-batch-size) lower (a step still sees the whole batch) or max_length"
        ) from error


def _arguments(
    model: PreTrainedModel,
    examples: Sequence[Example],
    settings: Settings,
    checkpoints: Path,
    save_steps: int,
) -> TrainingArguments:
    from transformers import TrainingArguments

    longest = longest_row(examples)
    device = choose_device(settings, model, longest)
    part, parts = shares_of(model.config, longest, settings)
    steps = math.ceil(len(examples) / settings.batch_size)
    validated: dict[str, Any] = {}
    if settings.validation is not None:
        save_steps = settings.validate_steps
        validated = {
            "eval_strategy": "steps",
            "eval_steps": save_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": LOSS,
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": settings.patience is not None,
        }
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,  # `examples` holds all of them
        train_sampling_strategy="sequential",
        per_device_train_batch_size=part,
        gradient_accumulation_steps=parts,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        bf16=settings.dtype == "bfloat16",
        use_cpu=not device.cuda,
        dataloader_pin_memory=device.cuda,
        use_liger_kernel=device.liger,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        ddp_find_unused_parameters=False,
        **validated,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else torch.DataParallel; several devices are accelerate's business
    return arguments


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """TensorBoard's files there, not among the checkpoints; unless the user named a place."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


def _filled(examples: Sequence[Example], batch_size: int, padding: int) -> Sequence[Example]:
    """The examples, for several processes with unlabelled ones that fill up the last batch.

    accelerate would fill it with the first examples again, and a short batch would be another
    one than that of a single process. Without a label nothing is added to the loss.
    """
    missing = -len(examples) % batch_size
    if world() == 1 or not missing:
        return examples
    nothing: Example = {"input_ids": [padding] * 2, "labels": [IGNORED] * 2}
    return [*examples, *[nothing] * missing]


def shares_of(config: PretrainedConfig, longest: int, settings: Settings) -> tuple[int, int]:
    """Examples at once on one device, and how many such parts make up its share of a batch.

    Raises RecipeError when the batch cannot be shared out so.
    """
    share, rest = divmod(settings.batch_size, world())
    if rest:
        raise RecipeError(f"batch_size {settings.batch_size} is no multiple of {world()} processes")
    vocabulary = config.get_text_config().vocab_size
    if "kl" in settings.penalty:
        vocabulary *= 2  # the logits of the base are there as well
    part = settings.per_device_batch_size or micro_batch(share, longest, vocabulary)
    if share % part:
        raise RecipeError(f"{share} examples a process are no multiple of {part} per device")
    return part, share // part
