"""The selection language: what parses, what it prints, what it means, how it fails."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taia.errors import SelectionError
from taia.kinds import Address, Kind, classify
from taia.selection import PRESETS, Constant, Layers, Linear, Selection, Term

LLAMA = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(6)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            "input_layernorm",
        )
    ),
]
ADDRESSES = [classify(name, "llama") for name in LLAMA]


def strength(text: str, name: str) -> float:
    return Selection.parse(text).strengths(ADDRESSES)[classify(name, "llama")]


LAYER = "model.layers.{}.{}_proj.weight"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("attention", LAYER.format(0, "self_attn.q"), 1),
        ("attention", LAYER.format(0, "mlp.up"), 0),
        ("attention", "model.norm.weight", 0),
        ("all - ffn - router", "lm_head.weight", 1),
        ("all - ffn - router", LAYER.format(3, "mlp.down"), 0),
        ("attention + ffn[0:2]*0.3", LAYER.format(1, "mlp.up"), 0.3),
        ("attention + ffn[0:2]*0.3", LAYER.format(2, "mlp.up"), 0),
        ("ffn[-2:]", LAYER.format(4, "mlp.up"), 1),
        ("ffn[-2:]", LAYER.format(3, "mlp.up"), 0),
        ("ffn[0, -1]", LAYER.format(5, "mlp.up"), 1),
        ("ffn[::2]", LAYER.format(4, "mlp.up"), 1),
        ("ffn[::2]", LAYER.format(3, "mlp.up"), 0),
        ("attention.q + attention.k", LAYER.format(0, "self_attn.k"), 1),
        ("attention.q + attention.k", LAYER.format(0, "self_attn.v"), 0),
        ("all*0.5", "model.embed_tokens.weight", 0.5),
        ("all*linear(0.2, 1)", LAYER.format(0, "mlp.up"), 0.2),
        ("all*linear(0.2, 1)", LAYER.format(5, "mlp.up"), 1),
        ("all*linear(0, 1)", LAYER.format(2, "mlp.up"), 0.4),
        ("attention@language", LAYER.format(0, "self_attn.q"), 1),
        ("all - attention + attention.q*-0.5", LAYER.format(0, "self_attn.q"), -0.5),
        ("all*1.5", LAYER.format(0, "self_attn.q"), 1.5),
        ("none", "lm_head.weight", 0),
    ],
)
def test_meaning(text: str, name: str, expected: float) -> None:
    assert strength(text, name) == pytest.approx(expected)


def test_terms_apply_left_to_right() -> None:
    assert strength("all*0.5 + ffn", LAYER.format(0, "mlp.up")) == 1
    assert strength("ffn + all*0.5", LAYER.format(0, "mlp.up")) == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_selection(name: str) -> None:
    assert Selection.parse(name) == Selection.parse(PRESETS[name])
    Selection.parse(name).strengths(ADDRESSES)


numbers = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 6))
ends = st.none() | st.integers(-40, 40)
layers = st.one_of(
    st.none(),
    st.builds(Layers, ends, ends, st.none() | st.integers(1, 9)),
    st.lists(st.integers(-40, 40), min_size=1, max_size=4).map(lambda i: Layers(indices=tuple(i))),
)
terms = st.builds(
    Term,
    kind=st.none() | st.sampled_from(list(Kind)),
    projection=st.none() | st.sampled_from(["q", "o", "gate", "down", "qkv"]),
    layers=layers,
    tower=st.none() | st.sampled_from(["language", "vision"]),
    strength=st.builds(Constant, numbers) | st.builds(Linear, numbers, numbers),
)
removals = terms.map(
    lambda t: Term(t.kind, t.projection, t.layers, t.tower, Constant(1.0), removes=True)
)
selections = st.builds(
    lambda first, rest: Selection((first, *rest)), terms, st.lists(terms | removals, max_size=4)
)


@given(selections)
def test_printing_parses_back(selection: Selection) -> None:
    assert Selection.parse(str(selection)) == selection
    assert hash(Selection.parse(str(selection))) == hash(selection)


@given(selections, st.data())
def test_spaces_do_not_matter(selection: Selection, data: st.DataObject) -> None:
    text = str(selection)
    squeezed = text.replace(" ", "")
    assert Selection.parse(squeezed) == selection


@given(st.text(alphabet="alnofe.q[]:,*@+-_ 0123456789()linear", max_size=30))
def test_any_text_parses_or_fails_with_a_column(text: str) -> None:
    try:
        selection = Selection.parse(text)
    except SelectionError as error:
        message = str(error)
    else:
        message = "column"
        assert Selection.parse(str(selection)) == selection
    assert "column" in message


@given(selections)
def test_complement_covers_every_address_once(selection: Selection) -> None:
    try:
        kept = selection.strengths(ADDRESSES)
    except SelectionError:
        return
    assert kept.keys() == set(ADDRESSES)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("atention", 1, "did you mean 'attention'"),
        ("all - ffm", 7, "did you mean 'ffn'"),
        ("attention.qq", 11, "unknown projection"),
        ("ffn[0:8", 5, "not closed"),
        ("ffn[a]", 5, "slice or a list"),
        ("ffn[::0]", 5, "slice or a list"),
        ("ffn*", 5, "expected a number"),
        ("ffn*1e999", 5, "finite"),
        ("ffn*linear(1)", 13, "two numbers"),
        ("ffn ffn", 5, "expected '+', '-'"),
        ("- ffn", 1, "begins with what it keeps"),
        ("all - ffn*0.5", 10, "takes none of its own"),
        ("", 1, "empty"),
        ("none + ffn", 6, "stands alone"),
        ("attention + taia", 13, "stands alone"),
        ("attention@", 11, "name of a tower"),
    ],
)
def test_errors_point_at_the_column(text: str, column: int, words: str) -> None:
    with pytest.raises(SelectionError) as caught:
        Selection.parse(text)
    message = str(caught.value)
    assert f"column {column}:" in message
    assert words in message
    assert message.splitlines()[-1].index("^") == column + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("router", "kinds here: attention, embedding, ffn, head, norm"),
        ("attention + mixer", "'mixer' matches nothing"),
        ("attention.gate", "its projections here: k, o, q, v"),
        ("ffn[6:]", "language has 6"),
        ("ffn[0,6]", "layer 6 of a model with 6 layers"),
        ("all - ffn[9:]", "matches nothing"),
        ("attention@vision", "towers here: language"),
    ],
)
def test_a_term_without_a_match_says_what_there_is(text: str, words: str) -> None:
    with pytest.raises(SelectionError, match="fault") as caught:
        Selection.parse(text).strengths(ADDRESSES)
    assert words in str(caught.value)


def test_all_faults_are_told_together() -> None:
    with pytest.raises(SelectionError) as caught:
        Selection.parse("router + mixer + ffn[77]").strengths(ADDRESSES)
    assert len(caught.value.faults) == 3


def test_taking_away_a_kind_that_is_not_there_changes_nothing() -> None:
    dense = Selection.parse("all - ffn - router").strengths(ADDRESSES)
    assert dense == Selection.parse("all - ffn").strengths(ADDRESSES)


def test_depth_may_be_told_for_a_part_of_a_model() -> None:
    few = [Address(Kind.FFN, layer, "up", "language") for layer in (0, 1)]
    strengths = Selection.parse("ffn*linear(0, 1)").strengths(few, layers=11)
    assert [strengths[a] for a in few] == pytest.approx([0, 0.1])


def test_a_linear_strength_ends_exactly_where_it_says():
    for first in (3.3, -7.1, 0.1, 1e9):
        assert Linear(first, 1.0).at(4, 5) == 1.0
