"""Fine-tuning: LoRA, MoLoRA, DoRA or all weights, over transformers' Trainer and PEFT.

One function, `finetune`, from a base model and a file of chats to a folder with an
adapter or a full model. Its defaults are the settings of the TAIA paper
(arXiv 2405.20192): LoRA of rank 16 and alpha 32 on all linear layers, learning rate
2e-4 with a cosine schedule and 3% warm-up, one epoch, bfloat16.

Numbers: with bfloat16 the frozen base stays in bfloat16, the LoRA factors are
float32, and the arithmetic is under autocast. Full fine-tuning keeps float32 master
weights and saves them in the base's own dtype, so that base and tuned can be
combined tensor by tensor.

A run that was stopped goes on from its last checkpoint with the same batches and
the same random numbers: on one CPU process the final weights are equal bit for bit.

Limits: no gradient checkpointing.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import OutputError, RecipeError
from taia.load import load_config, load_tokenizer, quiet_transformers
from taia.sources import resolve
from taia.training import distill, folder
from taia.training.callbacks import Interrupt, LogLine, Recorder, progress_bar, recording, watching
from taia.training.corpus import Corpus, digest_of_data, make_corpus, read_data
from taia.training.data import Encoded, digest, encode_all, read_chats, refuse_beyond_context
from taia.training.device import Device, choose_device
from taia.training.loop import check_trackers, make_trainer, run_trainer
from taia.training.mixture import parse_data
from taia.training.packing import Packing, packing_for, require_packing
from taia.training.ranks import is_first, on_first
from taia.training.ready import Ready, make_ready
from taia.training.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

__all__ = ["TrainResult", "finetune"]

PACKAGES = ("taia", "torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run made. `out` holds the adapter or model; `tokens` are those trained on."""

    out: Path
    method: str
    examples: int
    truncated: int
    dropped: int
    steps: int
    tokens: int
    seconds: float
    final_loss: float


def finetune(
    base: str | Path,
    data: str | Path | Sequence[Any] | Mapping[str, Any],
    out: str | Path,
    *,
    method: str = "lora",
    train: str = "all",
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    learning_rate: float = 2e-4,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 16,
    per_device_batch_size: int | None = None,
    max_length: int = 3072,
    warmup_ratio: float = 0.03,
    scheduler: str = "cosine",
    weight_decay: float = 0.0,
    seed: int = 0,
    max_examples: int | None = None,
    validation: str | Path | None = None,
    validate_steps: int = 100,
    patience: int | None = None,
    dtype: str = "bfloat16",
    packing: bool = False,
    self_distill: bool = False,
    experts: int = 4,
    experts_per_token: int = 1,
    balance: float = 0.0,
    expert_dropout: float = 0.0,
    penalty: Mapping[str, float] | None = None,
    fisher_data: str | Path | None = None,
    fisher_examples: int = 64,
    save_steps: int = 100,
    report_to: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[LogLine], None] | None = None,
) -> TrainResult:
    """Fine-tune `base` on the chats of `data` into the folder `out`.

    `data` is a file, a folder or a hub data set, or a mixture (`taia.training.mixture`).

    `self_distill`: the base rewrites the answers first (`taia.training.distill`).
    `train` is a selection: which linear layers get LoRA, or which parameters are
    trained with method `full`. The other settings: `taia.training.settings`.
    `report_to` names trackers of transformers' Trainer, such as tensorboard, trackio, wandb.
    `resume` goes on with a stopped run (or starts one, or returns a finished one);
    `overwrite` replaces a folder. `on_progress` is called with every log line.

    Raises RecipeError, DataError, SourceError, CheckpointError or OutputError before
    anything is written, TaiaError when the loss is not a number, KeyboardInterrupt
    after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    settings = Settings(
        base=str(base),
        data=parse_data(data),
        method=method,
        train=train,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        learning_rate=learning_rate,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        per_device_batch_size=per_device_batch_size,
        max_length=max_length,
        warmup_ratio=warmup_ratio,
        scheduler=scheduler,
        weight_decay=weight_decay,
        seed=seed,
        max_examples=max_examples,
        validation=None if validation is None else str(validation),
        validate_steps=validate_steps,
        patience=patience,
        dtype=dtype,
        packing=packing,
        self_distill=self_distill,
        experts=experts,
        experts_per_token=experts_per_token,
        balance=balance,
        expert_dropout=expert_dropout,
        penalty=dict(penalty or {}),
        fisher_data=None if fisher_data is None else str(fisher_data),
        fisher_examples=fisher_examples,
    )
    settings.check()
    if save_steps < 1:
        raise RecipeError(f"save_steps is {save_steps}: at least 1 is needed")
    check_trackers(report_to)
    target = Path(out).expanduser()
    done = on_first(lambda: folder.check(target, settings, resume=resume, overwrite=overwrite))
    if done is not None:
        if digest_of_data(settings.data, settings.max_examples) != done["data"]["sha256"]:
            raise folder.other_data(target, settings.data_names)
        return _result(target, done)
    run = _prepare(settings)
    name = run.ready.fisher_name
    checkpoint = on_first(
        lambda: folder.start(
            target,
            settings,
            run.corpus.digest,
            resume=resume,
            fisher=name,
            validation=run.validation_id,
            rewrites=run.rewrites_id,
        )
    )
    try:
        return _train(run, target, checkpoint, save_steps, report_to, on_progress)
    except OSError as error:
        raise OutputError(f"{target}: writing failed; mend it and resume: {error}") from error


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything that training needs, loaded and checked."""

    settings: Settings
    ready: Ready
    device: Device
    packing: Packing | None
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    validation: Encoded | None
    validation_id: str | None
    rewrites_id: str | None

    @property
    def steps(self) -> int:
        return -(-len(self.corpus.order) // self.settings.batch_size)

    def read_at(self, step: int) -> list[str]:
        """Where the examples of a step were read."""
        size, order = self.settings.batch_size, self.corpus.order
        return [self.corpus.where[number] for number in order[(step - 1) * size : step * size]]


def _prepare(settings: Settings) -> _Run:
    """Read the data, then the model: the cheap faults first."""
    source = resolve(settings.base)
    read = read_data(settings)
    tokenizer = load_tokenizer(source)
    corpus = make_corpus(settings, read, tokenizer)
    validation = validation_id = rewrites_id = None
    if settings.validation is not None:
        held_out = read_chats(settings.validation)
        validation = encode_all(held_out, tokenizer, settings.max_length)
        validation_id = digest(settings.validation, held_out)
    distilled: dict[str, Any] = {}
    if settings.self_distill:
        done = distill.self_distill(settings, read, tokenizer)
        rewritten = make_corpus(settings, done.chats, tokenizer)
        corpus, distilled = replace(rewritten, digest=corpus.digest), done.facts
        rewrites_id = done.digest
    config = load_config(source)
    refuse_beyond_context(corpus.examples, corpus.where, config)
    if validation is not None:
        refuse_beyond_context(validation.examples, validation.where, config)
    ready = make_ready(settings, source.form, tokenizer)
    ready = replace(ready, facts=ready.facts | distilled)
    device = choose_device(settings, ready.model, corpus.longest)
    packing = None
    if settings.packing:
        require_packing(ready.model)
        packing = packing_for(ready.model.config)
    return _Run(
        settings=settings,
        ready=ready,
        device=device,
        packing=packing,
        tokenizer=tokenizer,
        corpus=corpus,
        validation=validation,
        validation_id=validation_id,
        rewrites_id=rewrites_id,
    )


def _train(
    run: _Run,
    out: Path,
    checkpoint: Path | None,
    save_steps: int,
    report_to: Sequence[str],
    on_progress: Callable[[LogLine], None] | None,
) -> TrainResult:
    interrupt, recorder, batch_size = Interrupt(), None, run.settings.batch_size
    bars = progress_bar(run.steps) if is_first() else nullcontext()
    with quiet_transformers(), interrupt.listening(), bars as bar:
        if is_first() and on_progress is None:
            print(f"training on {run.device}", file=sys.stderr)
        trainer = make_trainer(
            run.ready.model,
            [run.corpus.examples[number] for number in run.corpus.order],
            run.settings,
            out / folder.CHECKPOINTS,
            packing=run.packing,
            padding=run.tokenizer.pad_token_id or run.tokenizer.eos_token_id or 0,
            save_steps=save_steps,
            additions=run.ready.additions,
            validation=run.validation.examples if run.validation else (),
            report_to=report_to,
        )
        trainer.add_callback(watching(interrupt, run.read_at))
        if is_first():
            recorder = Recorder(
                out / folder.LOG,
                steps=run.steps,
                examples=run.corpus.size,
                batch_size=batch_size,
                tokens=run.corpus.tokens(batch_size),
                padded=run.corpus.padded(
                    batch_size, trainer.args.per_device_train_batch_size, run.packing
                ),
                shares=run.corpus.shares(batch_size),
                from_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
                on_progress=on_progress or bar,
            )
            trainer.add_callback(recording(recorder))
        run_trainer(trainer, checkpoint)
        if interrupt.obeyed:
            raise KeyboardInterrupt(
                f"stopped at step {trainer.state.global_step} of {run.steps}; "
                f"{out} can be resumed from there"
            )
        finished = _finished(run, out, trainer)
        best = trainer.state.best_global_step
        return _result(out, on_first(lambda: _publish(run, recorder, best, out, finished)))


def _publish(
    run: _Run, recorder: Recorder | None, best: int | None, out: Path, finished: Path
) -> dict[str, Any]:
    """The finished files in their place; what train.json says. Of the first process alone."""
    assert recorder is not None
    record = _record(run, recorder, best)
    folder.publish(out, finished, record)
    return record


def _finished(run: _Run, out: Path, trainer: Trainer) -> Path:
    """The adapter or model with its tokenizer, in a folder beside the checkpoints.

    All processes call it: where each holds a part of the weights, they are put together.
    """
    finished = out / folder.CHECKPOINTS / "finished"
    model: Any = run.ready.model
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_first():
        return finished
    if run.settings.method == "full":
        model.config.use_cache = True
        if state is None:
            model.to(run.ready.stored_dtype)
        else:
            state = {name: value.to(run.ready.stored_dtype) for name, value in state.items()}
            model.config.dtype = run.ready.stored_dtype
        model.save_pretrained(finished, state_dict=state)
    else:
        model.peft_config["default"].base_model_name_or_path = run.settings.base
        model.save_pretrained(finished, save_embedding_layers=False, state_dict=state)
        (finished / "README.md").unlink(missing_ok=True)  # PEFT's form, not filled in
    run.tokenizer.save_pretrained(finished)
    return finished


def _record(run: _Run, recorder: Recorder, best: int | None) -> dict[str, Any]:
    """What train.json says. `best`: the step with the lowest validation loss, if one was taken."""
    settings, last = run.settings, recorder.lines[-1]
    chosen = {}
    if best is not None:
        loss = recorder.lines[best - 1]["validation_loss"]
        chosen = {"best": {"step": best, "validation_loss": loss}}
    return {
        "base": settings.base,
        "method": settings.method,
        "train": settings.train,
        "data": {
            "path": settings.data,
            "sha256": run.corpus.digest,
            "examples": len(run.corpus.examples),
            "truncated": run.corpus.truncated,
            "dropped": run.corpus.dropped,
            "parts": run.corpus.facts(),
        },
        "settings": asdict(settings),
        **run.ready.facts,
        **run.device.facts(),
        **chosen,
        "steps": int(last["step"]),
        "tokens": int(last["tokens"]),
        "seconds": last["seconds"],
        "throughput": recorder.throughput(),
        "final_loss": last["loss"],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _result(out: Path, record: dict[str, Any]) -> TrainResult:
    data = record["data"]
    return TrainResult(
        out=out,
        method=record["method"],
        examples=data["examples"],
        truncated=data["truncated"],
        dropped=data["dropped"],
        steps=record["steps"],
        tokens=record["tokens"],
        seconds=record["seconds"],
        final_loss=record["final_loss"],
    )
