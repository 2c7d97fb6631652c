"""Kinds in checkpoints of other sizes and options than those of the default configs."""

from __future__ import annotations

import pytest

from taia.kinds import Address, Kind, classify, classify_all, is_extra_layer


@pytest.mark.parametrize(
    ("model_type", "layers", "real", "extra"),
    [
        # GLM-4.5-Air has 46 layers and GLM-4.5 has 92; each stores one more
        ("glm4_moe", 92, 46, 92),
        ("glm4_moe", 46, 45, 46),
        ("deepseek_v3", 61, 60, 61),
        ("deepseek_v3", 26, 25, 26),
        ("deepseek_v3", 90, 61, 91),
        ("hy_v3", 100, 80, 100),
    ],
)
def test_the_config_tells_which_layers_are_real(model_type, layers, real, extra):
    names = ["self_attn.o_proj.weight", "mlp.shared_experts.up_proj.weight", "eh_proj.weight"]
    listed = [f"model.layers.{real}.{name}" for name in names[:2]]
    dropped = [f"model.layers.{extra}.{name}" for name in names]
    found = classify_all([*listed, *dropped], model_type, {"num_hidden_layers": layers})
    assert [found[name].kind for name in listed] == [Kind.ATTENTION, Kind.FFN]
    assert {found[name].layer for name in listed} == {real}
    assert {found[name] for name in dropped} == {Address(Kind.OTHER, None, None, "language")}


def test_the_config_of_the_text_model_tells_it_too():
    names = [f"model.language_model.layers.{n}.self_attn.o_proj.weight" for n in (46, 50)]
    config = {"text_config": {"num_hidden_layers": 50}, "num_hidden_layers": 3}
    found = classify_all(names, "dots3_note", config)
    assert [found[name].kind for name in names] == [Kind.ATTENTION, Kind.OTHER]


@pytest.mark.parametrize(
    ("model_type", "name", "kind"),
    [
        ("bamba", "model.layers.9.self_attn.q_proj.weight", Kind.ATTENTION),
        ("granitemoehybrid", "model.layers.5.self_attn.o_proj.weight", Kind.ATTENTION),
        ("lfm2", "model.layers.0.conv.in_proj.weight", Kind.MIXER),
        ("nemotron_h", "model.layers.1.mixer.fc1_latent_proj.weight", Kind.FFN),
        ("falcon_h1", "model.layers.1.mamba.norm.weight", Kind.MIXER),
        ("doge", "model.layers.1.mlp.router_gate.weight", Kind.ROUTER),
        (
            "zamba2",
            "model.layers.6.shared_transformer.self_attn.linear_q_adapter_list.0.0.weight",
            Kind.ATTENTION,
        ),
        (
            "switch_transformers",
            "decoder.block.1.layer.2.mlp.experts.expert_127.wi.weight",
            Kind.FFN,
        ),
        ("nllb-moe", "model.encoder.layers.3.ffn.experts.expert_99.fc1.weight", Kind.FFN),
        ("idefics", "model.perceiver_resampler.latents", Kind.OTHER),
        ("ernie", "ernie.embeddings.task_type_embeddings.weight", Kind.EMBEDDING),
    ],
)
def test_what_default_configs_leave_out_is_in_the_table(model_type, name, kind):
    assert classify(name, model_type).kind is kind


@pytest.mark.parametrize(
    ("layers", "model_type", "name", "beyond"),
    [
        (92, "glm4_moe", "model.layers.46.self_attn.q_proj.weight", False),
        (46, "glm4_moe", "model.layers.46.self_attn.q_proj.weight", True),
        (26, "deepseek_v3", "model.layers.26.eh_proj.weight", True),
        (26, "deepseek_v3", "model.layers.25.self_attn.o_proj.weight", False),
        (26, "llama", "model.layers.26.self_attn.o_proj.weight", False),
    ],
)
def test_only_a_layer_behind_the_last_one_may_be_missing(layers, model_type, name, beyond):
    assert is_extra_layer(name, model_type, {"num_hidden_layers": layers}) == beyond
