"""Evaluation through vLLM, as far as it can be shown where vLLM is not installed.

The adapters that an engine would be given, its arguments, the refusals, and the way in which a
model class that tells nothing before its end is asked (lm-eval's own, which behaves alike).
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from taia.errors import EvaluationError, RecipeError
from taia.evaluation.variants import parse_variants
from taia.evaluation.vllm import adapter_folders, engine_arguments
from taia.sources import resolve


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_nothing_is_begun(tmp_path):
    from taia.evaluation.harness import evaluate

    with pytest.raises(RecipeError, match="vLLM is not installed"):
        evaluate("base", tmp_path / "out", tasks=["csqa"], variants=["base"], backend="vllm")
    assert not (tmp_path / "out").exists()


def test_one_engine_has_room_for_every_adapter():
    plain = engine_arguments("base", dtype="bfloat16", seed=3)
    assert plain == {"pretrained": "base", "dtype": "bfloat16", "seed": 3}
    made = engine_arguments("base", dtype="bfloat16", seed=3, ranks=[4, 20])
    assert made == plain | {"enable_lora": True, "max_loras": 1, "max_lora_rank": 32}
    with pytest.raises(EvaluationError, match="rank 600"):
        engine_arguments("base", dtype="bfloat16", seed=3, ranks=[600])


def test_every_variant_is_a_sliced_adapter(adapters, tmp_path):
    from safetensors.numpy import load_file

    base, adapter = adapters("llama", "patterns")
    variants = parse_variants(["base", "vanilla", "taia", "half=ffn*0.5"])
    found = adapter_folders(base, resolve(adapter), variants, tmp_path)
    assert found["base"] is None
    kinds = {"taia": "self_attn", "half": "mlp", "vanilla": ""}
    for name, kind in kinds.items():
        config = json.loads((found[name] / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert not config["alpha_pattern"]  # vLLM does not know them
        assert not config["rank_pattern"]
        names = list(load_file(found[name] / "adapter_model.safetensors"))
        assert names
        assert all(kind in one for one in names)
    with pytest.raises(EvaluationError, match="loracl"):
        adapter_folders(base, resolve(adapter), parse_variants(["loracl"]), tmp_path)


def test_another_model_class_is_asked_part_by_part(tmp_path, monkeypatch):
    from chat_tools import byte_tokenizer
    from conftest import build
    from lm_eval.models.huggingface import HFLM

    from taia.evaluation import scoring
    from taia.evaluation.catalogue import find_tasks, load_task
    from taia.evaluation.engine import wrap
    from taia.evaluation.quiet import quiet_lm_eval

    rows = [{"id": f"{n}", "question": f"{n}?", "choices": ["a", "bc"], "answer": 0}
            for n in range(5)]  # fmt: skip
    texts = [{"id": f"{n}", "question": f"{n}+1?", "answer": "1"} for n in range(3)]
    for name, some in (("csqa", rows), ("svamp", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    model = build("llama", 0, vocab_size=300, max_position_embeddings=640, num_hidden_layers=1)
    monkeypatch.setattr(scoring, "PART", 4)
    with quiet_lm_eval():
        other = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2)
    ours = wrap(model, byte_tokenizer(), 2)
    for source in find_tasks(["csqa", "svamp"], tmp_path):
        task, parts = load_task(source, protocol="chat"), []
        task.set_config("generation_kwargs", {"until": [], "max_gen_toks": 6})
        theirs = scoring.score(other, source.name, task, on_examples=parts.append)
        assert [one for part in parts for one in part] == theirs
        for one, same in zip(scoring.score(ours, source.name, task), theirs, strict=True):
            assert one.prediction == same.prediction
            assert one.loglikelihoods == pytest.approx(same.loglikelihoods, abs=1e-4)
