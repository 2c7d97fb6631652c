"""Batched generation writes what transformers writes for one prompt at a time."""

from __future__ import annotations

import random

import pytest
from chat_tools import byte_tokenizer
from conftest import build

from taia.errors import RecipeError, TaiaError
from taia.generation import generate
from taia.slots import Slots, steady_length

WORDS = {"vocab_size": 260, "eos_token_id": 256, "bos_token_id": 257}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,  # a tied random head repeats one token for ever
    },
    "gpt2": {"n_positions": 128},
    "mixtral": {},
}
BEGINNING = [257, *b"the beginning of all prompts"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def models():
    """A function: model type -> a tiny random model in float32 that writes varied texts."""
    import torch

    made = {}

    def make(model_type):
        if model_type not in made:
            changes = WORDS | FAMILIES[model_type]
            if model_type != "gpt2":
                changes |= {"pad_token_id": 256, "max_position_embeddings": 128}
            made[model_type] = model = build(model_type, 0, **changes)
            with torch.no_grad():  # small weights would repeat one token as well
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.add_(0.3 * torch.randn_like(parameter))
        return made[model_type]

    return make


def prompts_of(count: int, *, beginning: list[int] = (), seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = [draw.choice([1, 3, 20, 20, 36]) for _ in range(count)]
    return [[*beginning, *(draw.randrange(256) for _ in range(n))] for n in lengths]


def alone(model, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy tokens for one prompt."""
    import torch

    ids = torch.tensor([prompt])
    row = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return row[0, len(prompt) :].tolist()


def ending(model, tokens: list[list[int]]) -> int:
    """A token that some of the texts hold in the middle: as the end token, it ends them there."""
    return next(token for row in tokens for token in row[3:9])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_tokens_are_those_of_one_prompt_at_a_time(models, tokenizer, model_type):
    model, budgets = models(model_type), [30, 3, 17, 1, 25]
    for beginning in ([], BEGINNING):
        prompts = prompts_of(5, beginning=beginning, seed=6)
        expected = [alone(model, *pair) for pair in zip(prompts, budgets, strict=True)]
        assert len({token for row in expected for token in row}) > 15
        for slots in (1, 3, None):
            written = generate(model, tokenizer, prompts, max_new_tokens=budgets, slots=slots)
            assert [list(one.tokens) for one in written] == expected


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_without_a_number_of_slots_memory_decides(models, tokenizer, monkeypatch, model_type):
    model, seen = models(model_type), []
    step = Slots.inputs

    def watched(slots, *arguments):
        seen.append(len(slots.lengths))
        return step(slots, *arguments)

    monkeypatch.setattr(Slots, "inputs", watched)
    prompts = [[*range(n)] for n in (20, 20, 9, 8, 7)]
    texts = generate(model, tokenizer, prompts, max_new_tokens=12)
    assert max(seen) == 5
    config = model.config
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    monkeypatch.setattr("taia.slots.ROOM", 2 * token * (20 + 12) + token)
    monkeypatch.setattr("taia.generation.FEWEST", 1)
    seen.clear()
    assert generate(model, tokenizer, prompts, max_new_tokens=12) == texts
    assert max(seen) == 2


@pytest.mark.slow
def test_an_end_token_ends_a_text_and_refills_its_slot(models, tokenizer):
    model = models("llama")
    prompts = prompts_of(12, seed=1)
    free = generate(model, tokenizer, prompts, max_new_tokens=30, slots=4)
    end = ending(model, [list(one.tokens) for one in free])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [256, end]
    try:
        written = generate(model, tokenizer, prompts, max_new_tokens=30, slots=4)
        expected = [alone(model, prompt, 30) for prompt in prompts]
    finally:
        model.generation_config.eos_token_id = before
    assert [list(one.tokens) for one in written] == expected
    assert [one.finished for one in written] == [row[-1] in (256, end) for row in expected]
    assert any(one.finished for one in written)


def test_neither_slots_nor_order_matter(models, tokenizer):
    model, prompts = models("gemma3_text"), prompts_of(10, seed=2)
    written = generate(model, tokenizer, prompts, max_new_tokens=20, slots=3)
    turned = generate(model, tokenizer, prompts[::-1], max_new_tokens=20, slots=7)
    assert turned[::-1] == written
    sampled = [
        generate(model, tokenizer, prompts, max_new_tokens=9, slots=n, temperature=0.8, seed=3)
        for n in (2, 10)
    ]
    assert sampled[0] == sampled[1]
    assert [one.tokens for one in sampled[0]] != [one.tokens[:9] for one in written]
    other = generate(model, tokenizer, prompts, max_new_tokens=9, temperature=0.8, seed=4)
    assert other != sampled[0]


def test_samples_follow_the_softmax(models, tokenizer):
    import torch

    model = models("llama")
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    chances = torch.softmax(logits / 0.5, dim=-1)
    drawn = generate(
        model, tokenizer, [[5, 6, 7]] * 2000, max_new_tokens=1, slots=500, temperature=0.5
    )
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in drawn]), minlength=260)
    spread = (chances * (1 - chances) / 2000).sqrt()
    assert ((counts / 2000 - chances).abs() <= 5 * spread + 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(1,), (2, 1), (3, 0)])
def test_stop_strings_cut_as_in_lm_eval(models, tokenizer, lengths):
    from lm_eval.models.utils import postprocess_generated_text

    model = models("llama")
    prompts = prompts_of(8, seed=5)
    free = generate(model, tokenizer, prompts, max_new_tokens=60, slots=8)
    # strings that the texts hold: random bytes seldom hold one that is chosen beforehand
    stop = [free[at].text[5 : 5 + length] for at, length in enumerate(lengths)]
    written = generate(model, tokenizer, prompts, max_new_tokens=60, slots=3, stop=stop)
    for one, whole in zip(written, free, strict=True):
        assert one.text == postprocess_generated_text(whole.text, stop, None)
        assert one.tokens == whole.tokens[: len(one.tokens)]
    assert sum(len(one.tokens) for one in written) < sum(len(one.tokens) for one in free)
    assert any(one.finished for one in written)


def test_texts_are_told_as_they_are_complete(models, tokenizer):
    told = {}
    written = generate(
        models("llama"), tokenizer, prompts_of(7), max_new_tokens=[7, 1, 9, 4, 4, 2, 20], slots=2,
        on_done=lambda index, tokens, text: told.update({index: (tokens, text)}),
    )  # fmt: skip
    assert told == {at: (one.tokens, one.text) for at, one in enumerate(written)}
    assert list(told) != sorted(told)


def test_the_model_is_left_as_it_was(models, tokenizer):
    import torch

    model = models("qwen2")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    try:
        generate(model, tokenizer, prompts_of(3), max_new_tokens=4)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_an_adapter_takes_part(tokenizer):
    import torch
    from peft import LoraConfig, get_peft_model

    base = build("llama", 0, **WORDS, pad_token_id=256, max_position_embeddings=128)
    prompts = prompts_of(5)
    before = generate(base, tokenizer, prompts, max_new_tokens=12)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    written = generate(model, tokenizer, prompts, max_new_tokens=12, slots=2)
    assert written != before
    model.eval()
    assert [list(one.tokens) for one in written] == [alone(base, p, 12) for p in prompts]


@pytest.mark.parametrize(
    ("model_type", "wishes"), [("llama", {"repetition_penalty": 1.3}), ("mamba", {})]
)
def test_what_slots_cannot_hold_is_left_to_transformers(models, tokenizer, model_type, wishes):
    if model_type == "mamba":
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=260, hidden_size=16, state_size=4, num_hidden_layers=2,
                             eos_token_id=256, bos_token_id=257, pad_token_id=256)  # fmt: skip
        model = MambaForCausalLM(config).eval()
    else:
        model = models(model_type)
    prompts = prompts_of(5)
    before = {name: getattr(model.generation_config, name) for name in wishes}
    for name, value in wishes.items():
        setattr(model.generation_config, name, value)
    try:
        written = generate(model, tokenizer, prompts, max_new_tokens=[9, 2, 9, 9, 4], slots=2)
        counts = [len(one.tokens) for one in written]
        expected = [alone(model, p, n) for p, n in zip(prompts, counts, strict=True)]
        stop = [next(one.text[1:3] for one in written if len(one.text) > 3)]
        cut = generate(model, tokenizer, prompts, max_new_tokens=9, slots=2, stop=stop)
    finally:
        for name, value in before.items():
            setattr(model.generation_config, name, value)
    assert [list(one.tokens) for one in written] == expected
    assert all(stop[0] not in one.text for one in cut)


def test_texts_that_pass_a_change_of_frequencies_are_written_alone(tokenizer):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "factor": 4.0}
    model = build("llama", 0, **WORDS, head_dim=8, rope_parameters=rope,
                  max_position_embeddings=128, pad_token_id=256)  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 3
    prompts = prompts_of(5, beginning=BEGINNING[:10])
    assert steady_length(model) == 24
    written = generate(model, tokenizer, prompts, max_new_tokens=12, slots=3)
    assert [list(one.tokens) for one in written] == [alone(model, p, 12) for p in prompts]


def test_a_text_ends_where_the_model_can_read_no_further(models, tokenizer):
    model = models("gpt2")
    (one,) = generate(model, tokenizer, [list(range(100))], max_new_tokens=500)
    assert one.finished or len(one.tokens) == 28


def test_bad_arguments_are_told_together(models, tokenizer):
    with pytest.raises(RecipeError) as caught:
        generate(models("gpt2"), tokenizer, [[], [1] * 128, [1]], max_new_tokens=4, slots=0,
                 temperature=-1)  # fmt: skip
    assert [fault.split()[0] for fault in caught.value.faults] == [
        "slots", "temperature", "prompt", "prompt",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="2 numbers for 1 prompts"):
        generate(models("gpt2"), tokenizer, [[1]], max_new_tokens=[1, 2])
    assert generate(models("gpt2"), tokenizer, [], max_new_tokens=4) == []


def test_logits_that_are_no_numbers_are_an_error(tokenizer):
    model = build("llama", 0, **WORDS, pad_token_id=256)
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(TaiaError, match="not numbers"):
        generate(model, tokenizer, [[1, 2]], max_new_tokens=2)
