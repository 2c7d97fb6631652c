"""The front matter of a model card: what the hub accepts, and nothing private."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from taia.card import card


@pytest.mark.parametrize(
    ("base", "tuned", "on_hub"),
    [
        ("org/base", "org/tuned@v1.0", ["org/base", "org/tuned"]),
        ("hf://org/base@main/adapter", "hf://org/tuned", ["org/base", "org/tuned"]),
        ("https://example.org/models/base", "s3://bucket/org/tuned", None),
        ("/home/someone/models/base", "./out/tuned", None),
        ("org/base", "../runs/tuned model", ["org/base"]),
        (None, "org/tuned", ["org/tuned"]),
    ],
)
def test_only_ids_of_the_hub_are_base_models(base, tuned, on_hub):
    made = ModelCard(card("out", base=base, tuned=tuned, selection="attention", body="tables"))
    assert made.data.base_model == on_hub
    assert made.data.to_dict().get("base_model_relation") == ("merge" if on_hub else None)
    assert made.data.tags == ["taia", "merge"]
    assert "/home/" not in str(made)


def test_a_folder_of_the_name_of_a_repository_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    made = ModelCard(card("out", base="org/base", tuned="a/b", selection="all", body=""))
    assert made.data.base_model == ["a/b"]
