"""Tiny models of every family that the laws are shown on, and the shared data where it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only get in their way

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

FAMILIES = {
    "llama": {**SMALL, "tie_word_embeddings": True},
    "qwen2": {**SMALL, "tie_word_embeddings": False},
    "qwen3": {**SMALL, "head_dim": 8},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 8},
    "phi3": SMALL,
    "gpt2": GPT2,
    "gpt_neox": {**SMALL, "num_key_value_heads": None},
    "olmo2": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Model type -> the fields of a config that make it tiny."""


def build(model_type: str, seed: int, dtype: str = "float32", **changes: object):
    """A random model of one family. Every weight is random, biases and norms included."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in FAMILIES[model_type].items() if v is not None}
    config = AutoConfig.for_model(model_type, **(fields | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A function (model_type, dtype) -> folders of a base and of a tuned checkpoint."""
    made: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def make(model_type: str, dtype: str = "float32", shard: str | None = None, **changes):
        key = (model_type, dtype, str(shard), repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{model_type}-{dtype}")
            for name, seed in (("base", 0), ("tuned", 1)):
                model = build(model_type, seed, dtype, **changes)
                model.save_pretrained(folder / name, **({"max_shard_size": shard} if shard else {}))
            made[key] = (folder / "base", folder / "tuned")
        return made[key]

    return make


@pytest.fixture(scope="session")
def adapters(pair, tmp_path_factory):
    """A function (model_type, setting of adapter_tools) -> folders of a base and an adapter."""
    from adapter_tools import SETTINGS, save_adapter

    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(model_type: str, setting: str) -> tuple[Path, Path]:
        if (model_type, setting) not in made:
            base, _ = pair(model_type)
            out = tmp_path_factory.mktemp(f"{model_type}-{setting}") / "adapter"
            made[model_type, setting] = (base, save_adapter(base, out, **SETTINGS[setting]))
        return made[model_type, setting]

    return make


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    os.environ["TAIA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real evaluation and fine-tuning data, kept beside the project and not in it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the project: its real data sets are not here")
    return folder
