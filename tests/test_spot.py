"""derivation.spot: model types that the shipped table does not know, from their config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from taia.derivation import spot
from taia.errors import KindError
from taia.kind_table import known_types
from taia.kinds import classify, classify_all

SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    spot._made.clear()
    return tmp_path / "cache" / "kinds"


@pytest.fixture
def starcoder(monkeypatch):
    """Names and config of a small model of a type that is taken out of the table."""
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    config = Starcoder2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_bias=True,
    )  # fmt: skip
    names = list(Starcoder2ForCausalLM(config).state_dict())
    known = classify_all(names, "starcoder2")
    monkeypatch.delitem(known_types(), "starcoder2")
    return names, config.to_dict(), known


def test_a_type_that_the_table_lacks_is_derived_from_its_config(starcoder, own_cache):
    names, config, known = starcoder
    assert classify_all(names, "starcoder2", config) == known
    assert len(list(own_cache.glob("*.json"))) == 1


def test_a_derived_table_is_kept_for_the_next_process(starcoder, own_cache):
    names, config, _ = starcoder
    classify_all(names, "starcoder2", config)
    (file,) = own_cache.glob("*.json")
    table = json.loads(file.read_text(encoding="utf-8"))
    table["prefix"] = "seen"
    file.write_text(json.dumps(table), encoding="utf-8")
    spot._made.clear()
    assert spot.derived_table("starcoder2", config) == table


def test_a_broken_table_in_the_cache_is_made_again(starcoder, own_cache):
    names, config, known = starcoder
    classify_all(names, "starcoder2", config)
    (file,) = own_cache.glob("*.json")
    file.write_text("{", encoding="utf-8")
    spot._made.clear()
    assert classify_all(names, "starcoder2", config) == known


def test_without_a_config_the_type_itself_is_derived(starcoder):
    names, _, known = starcoder
    assert classify(names[0], "starcoder2") == known[names[0]]


def test_a_composite_model_whose_parts_the_table_has_not_seen_together():
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={
            "model_type": "stablelm", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2,
            "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
        },
        vision_config={
            "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    with torch.device("meta"):
        names = list(LlavaForConditionalGeneration(config).state_dict())
    with pytest.raises(KindError, match="tensor names are unknown"):
        classify_all(names, "llava")
    found = classify_all(names, "llava", config.to_dict())
    towers = {found[name].tower for name in names}
    assert towers == {"language", "vision", "projector"}
    vision = "model.vision_tower.encoder.layer.1.attention.q_proj.weight"
    assert (found[vision].kind, found[vision].layer) == ("attention", 1)


def test_an_option_that_the_table_has_not_seen():
    import torch
    from transformers import XmodConfig, XmodForCausalLM

    config = XmodConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, languages=["en_XX", "de_DE"], is_decoder=True,
    )  # fmt: skip
    with torch.device("meta"):
        names = list(XmodForCausalLM(config).state_dict())
    name = "roberta.encoder.layer.1.output.adapter_modules.de_DE.dense1.weight"
    assert name in names
    with pytest.raises(KindError, match="tensor names are unknown"):
        classify_all(names, "xmod")
    found = classify_all(names, "xmod", config.to_dict())
    assert found[name] == found[name.replace("de_DE", "en_XX")]


def test_a_type_that_transformers_lacks_names_the_command():
    with pytest.raises(KindError, match=r"pip install --upgrade transformers") as raised:
        classify_all(["lm_head.weight"], "llama9", {"model_type": "llama9"})
    assert "did you mean 'llama'" in str(raised.value)


def test_code_that_comes_with_weights_is_never_run():
    config = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    with pytest.raises(KindError, match="such code is never run"):
        classify_all(["lm_head.weight"], "own", config)


def test_sizes_that_no_model_has_are_refused(starcoder):
    names, config, _ = starcoder
    with pytest.raises(KindError, match="num_hidden_layers is 1000000000, more than any model"):
        classify_all(names, "starcoder2", {**config, "num_hidden_layers": 10**9})


def test_a_config_that_builds_nothing_is_a_reason(starcoder):
    names, config, _ = starcoder
    with pytest.raises(KindError, match="cannot be derived from its config"):
        classify_all(names, "starcoder2", {**config, "hidden_size": "wide"})


def test_a_type_without_a_text_decoder_is_refused():
    with pytest.raises(KindError, match="no class with a text decoder"):
        classify_all(["classifier.weight"], "vit", {"model_type": "vit"})


def test_without_transformers_the_message_says_what_to_install():
    """An interpreter without site-packages: neither torch nor transformers is there."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from taia.errors import KindError\n"
        "from taia.kinds import classify\n"
        "classify('lm_head.weight', 'llama')\n"
        "try: classify('lm_head.weight', 'llama9')\n"
        "except KindError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'taia[train]'" in done.stdout
