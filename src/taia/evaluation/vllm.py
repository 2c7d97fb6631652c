"""Variants on vLLM, for GPUs: lm-eval's own vLLM model, one engine for all variants.

With an adapter every variant is a sliced adapter in a temporary folder, and the engine is told
with each request which one to take (multi-LoRA), so the base is in memory once. With a fine-tuned
checkpoint every variant is an engine of its own, one after another.

Limits: what vLLM takes as LoRA (no modules_to_save, no biases); LoRACL needs the losses of
prompts, which it does not give. Written against lm-eval's class and vLLM's documented
`LoRARequest`; the arguments are tested, an engine has not been run by our tests.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from taia.errors import EvaluationError
from taia.evaluation.loracl import LORACL
from taia.evaluation.result import Variant
from taia.evaluation.variants import checkpoint_of
from taia.files import read_json
from taia.load import materialise
from taia.sources import Form, Source

__all__ = ["adapter_folders", "engine_arguments", "vllm_models"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that a vLLM engine can be built for."""


def engine_arguments(
    model: str | Path, *, dtype: str, seed: int, ranks: Sequence[int] = ()
) -> dict[str, Any]:
    """The arguments of lm-eval's vLLM model. `ranks`: of the adapters that it will be given.

    Raises EvaluationError for a rank that vLLM has no engine for.
    """
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": dtype, "seed": seed}
    if not ranks:
        return arguments
    room = [one for one in RANKS if one >= max(ranks)]
    if not room:
        raise EvaluationError(
            f"an adapter of rank {max(ranks)}: vLLM takes up to {RANKS[-1]}. Merge the variants "
            "(taia splice --merge) and evaluate them with --tuned"
        )
    return arguments | {"enable_lora": True, "max_loras": 1, "max_lora_rank": room[0]}


def adapter_folders(
    base: str | Path, change: Source, variants: Sequence[Variant], folder: Path
) -> dict[str, Path | None]:
    """A sliced adapter in `folder` for each variant by name; None for the base."""
    from taia.splice import splice

    found: dict[str, Path | None] = {}
    for variant in variants:
        if variant.selection == LORACL:
            raise EvaluationError(f"{LORACL}: not with vLLM; evaluate it with --backend hf")
        if variant.selection == "none":
            found[variant.name] = None
        else:  # the whole adapter too: vLLM does not know all that PEFT's configuration can state
            found[variant.name] = folder / variant.folder
            splice(base, change, folder / variant.folder, keep=variant.selection)
    return found


def vllm_models(
    base: str | Path,
    change: Source | None,
    variants: Sequence[Variant],
    *,
    dtype: str,
    seed: int,
) -> Iterator[tuple[Variant, Any]]:
    """Each variant with a model of lm-eval's that is that variant until the next is asked for."""
    from lm_eval.models.vllm_causallms import VLLM

    if change is not None and change.form is Form.ADAPTER:
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(prefix="taia-eval-") as scratch:
            folders = adapter_folders(base, change, variants, Path(scratch))
            ranks = [_rank(path) for path in folders.values() if path]
            arguments = engine_arguments(materialise(base), dtype=dtype, seed=seed, ranks=ranks)
            lm = VLLM(**arguments)
            for number, variant in enumerate(variants, start=1):
                path = folders[variant.name]
                lm.lora_request = LoRARequest(variant.name, number, str(path)) if path else None
                yield variant, lm
        return
    for variant in variants:
        with checkpoint_of(base, change, variant) as source:
            lm = VLLM(**engine_arguments(materialise(source), dtype=dtype, seed=seed))
            yield variant, lm
        del lm
        gc.collect()


def _rank(adapter: Path) -> int:
    """The largest rank of an adapter's modules."""
    config = read_json(adapter / "adapter_config.json")
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
