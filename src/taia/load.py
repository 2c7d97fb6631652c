"""Model weights and tokenizers in memory, from any source that `taia.sources` finds.

A checkpoint folder is read from safetensors only, and no code that a model
ships is ever run: a pickle or a custom model class is refused, not trusted.
A GGUF file is unpacked to plain weights on the way in. `materialise` writes
that unpacked model once into the user's cache, as a safetensors folder, for
everything that reads folders (plan, splice, vLLM, lm-eval).

Limits: causal language models only; a quantised checkpoint folder loads as
transformers loads it; unpacking a GGUF file gives back the rounding of its
quantisation, not the weights it was made from.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import CheckpointError, OutputError, RecipeError, SourceError
from taia.gguf_header import read_gguf
from taia.sources import Form, Source, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_config", "load_model", "load_tokenizer", "materialise", "require_chat_template"]

DTYPES = ("auto", "bfloat16", "float16", "float32")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_tokenizer(source: str | Path | Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, adapter folder or GGUF file.

    Raises SourceError when there is none, CheckpointError when it does not load.
    """
    from transformers import AutoTokenizer

    found = _unpacked(resolve(source))
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(**_location(found))
        except Exception as error:  # third-party parsers raise nearly anything
            raise CheckpointError(
                f"{found.text}: its tokenizer does not load ({_first_line(error)}). "
                "The folder needs tokenizer.json, or the files of its own tokenizer"
            ) from error


def load_config(source: str | Path | Source) -> PretrainedConfig:
    """The configuration of a checkpoint or GGUF file. Raises SourceError, CheckpointError."""
    from transformers import AutoConfig

    found = _unpacked(resolve(source))
    _check_form(found)
    with quiet_transformers():
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(**_location(found))
        except Exception as error:  # third-party parsers raise nearly anything
            raise CheckpointError(
                f"{found.text}: its configuration does not load ({_first_line(error)})"
            ) from error
    return config


def load_model(
    source: str | Path | Source, *, dtype: str = "bfloat16", device: str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    `dtype`: bfloat16, float16, float32, or auto (as stored). `device`: None takes
    the first CUDA device if there is one, else the CPU.
    Raises SourceError (not a loadable model), CheckpointError (broken or
    incomplete weights), RecipeError (unknown dtype or device).
    """
    found = resolve(source)
    torch_dtype, place = _dtype(dtype), _device(device)
    if dtype == "bfloat16":
        found = _unpacked(found)
    _check_form(found)
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = _location(found) | {"dtype": torch_dtype}
    if found.form is Form.GGUF:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    with quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(output_loading_info=True, **options)
        except Exception as error:  # third-party parsers raise nearly anything
            raise CheckpointError(
                f"{found.text}: the model does not load ({_first_line(error)})"
            ) from error
    _check_complete(found, info)
    if found.form is Form.GGUF and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now; save_pretrained asks
    try:
        return model.to(place).eval()
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise CheckpointError(
            f"{found.text}: does not go onto {place} ({_first_line(error)}); it may need more "
            "memory than is free there"
        ) from error


def materialise(source: str | Path | Source) -> Path:
    """A safetensors folder for `source`: the folder itself, or a GGUF file unpacked to bfloat16.

    The unpacked model is kept in `$TAIA_CACHE` (or ~/.cache/taia) under a name that
    changes when the file's path, size or time changes, so it is written once.
    """
    found = resolve(source)
    if found.form is not Form.GGUF:
        return found.path
    out = _place_in_cache(found.path)
    if (out / "config.json").is_file():
        return out
    from taia.files import staged_folder

    model, tokenizer = load_model(found, device="cpu"), load_tokenizer(found)
    try:
        with quiet_transformers(), staged_folder(out, overwrite=False) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OutputError:
        if not (out / "config.json").is_file():  # else another process was first: the same files
            raise
    return out


def require_chat_template(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> None:
    """Raise RecipeError when the model has no chat template, and say how to give it one."""
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"{source}: the model has no chat template, so chats cannot be turned into its text. "
            "Put one into its folder as chat_template.jinja (a Jinja template over `messages` and "
            "`add_generation_prompt`), or take the chat-tuned sibling of this model"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither progress bars nor advice from transformers inside the block; restored after it."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_bar = gguf.tqdm  # this one does not ask the setting above
    gguf.tqdm = functools.partial(gguf_bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _location(found: Source) -> dict[str, Any]:
    """How transformers is told where a source is."""
    if found.form is Form.GGUF:
        place: dict[str, Any] = {
            "pretrained_model_name_or_path": str(found.path.parent),
            "gguf_file": found.path.name,
        }
    else:
        place = {"pretrained_model_name_or_path": str(found.path), "local_files_only": True}
    return place | {"trust_remote_code": False}  # unset, transformers would ask on a terminal


def _check_form(found: Source) -> None:
    """Refuse what is no loadable checkpoint, before the slow part."""
    if found.form is Form.ADAPTER:
        raise SourceError(
            f"{found.text}: an adapter, not a model. Give its base as the model "
            "(base_model_name_or_path in adapter_config.json) and this folder as the adapter"
        )
    if found.form is Form.GGUF and read_gguf(found.path.resolve(), found.text).is_adapter:
        raise SourceError(f"{found.text}: a LoRA adapter for llama.cpp; its base is a GGUF file")
    if found.form is Form.GGUF or any(found.path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in found.path.glob(pattern))
    if pickles:
        raise SourceError(
            f"{found.text}: only pickle weights ({', '.join(pickles[:3])}), which can run code "
            "when opened. Convert it where you trust it: load it with transformers and write it "
            "with save_pretrained, which gives model.safetensors"
        )
    raise SourceError(f"{found.text}: no weights in it (model.safetensors is missing)")


def _check_complete(found: Source, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CheckpointError(
            f"{found.text}: {len(missing)} tensors of the model are not in its files; "
            "random numbers would stand in for them",
            missing,
        )


def _dtype(name: str) -> torch.dtype | str:
    if name not in DTYPES:
        raise RecipeError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    if name == "auto":
        return name
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device {name!r}: not one that torch knows (cpu, cuda:0)") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {name!r}: torch finds no CUDA device here; use cpu")
    return device


def _place_in_cache(file: Path) -> Path:
    """Where a GGUF file's unpacked folder is: its stem and a hash of path, size and time."""
    cache = Path(os.environ.get("TAIA_CACHE") or "~/.cache/taia").expanduser()
    state = file.stat()
    text = f"{file.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    return cache / "materialised" / f"{file.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _unpacked(found: Source) -> Source:
    """The unpacked copy of a GGUF source where there is one: the same bits, 20 s sooner."""
    if found.form is Form.GGUF:
        folder = _place_in_cache(found.path)
        if (folder / "config.json").is_file():
            return Source(found.text, Form.CHECKPOINT, folder)
    return found


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
