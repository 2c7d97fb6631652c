"""The demo's data: strict parsing, whole files, a second run that does nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "demo_data.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_data"] = module
    spec.loader.exec_module(module)
    return module


def turn(text: str, ideal: str) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": text}], "ideal": ideal}


CASES = {
    "radio": turn("Which is it?\nA. one\nB. glad: very\nC. two\n", "B"),
    "singer": turn("Text: la la \nChoices: one, glad: very, two", "glad: very"),
}
JOBS = [
    turn(f"What is the SOC Code for the job title {title}'", f" {title}s")
    for title in ("Baker", "Cook", "Guide", "Nurse")
]


@pytest.mark.parametrize("name", CASES)
def test_a_good_record_parses(script: ModuleType, name: str) -> None:
    record = getattr(script, name)(CASES[name])
    assert record["answer"] == 1
    assert record["choices"][1] == "glad: very"
    assert record["question"]
    assert "\n" not in record["question"]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("radio", turn("A. one\nB. two", "A")),
        ("radio", turn("Which?\nA. one\nC. two", "A")),
        ("radio", turn("Which?\nA. one\nB. one", "A")),
        ("radio", turn("Which?\nA. one\nB. two", "C")),
        ("radio", turn("Which?", "A")),
        ("singer", turn("Text: la\nChoices: one, two", "three")),
        ("sarcasm", turn("no system turn", "1")),
        ("jobs", turn("What is the SOC Code for the job title Cook?", " Cooks")),
    ],
)
def test_a_record_that_does_not_parse_is_none(
    script: ModuleType, name: str, record: dict[str, Any]
) -> None:
    assert getattr(script, name)(record) is None


def test_convert_counts_what_it_leaves_out(script: ModuleType) -> None:
    lines = [json.dumps(CASES["radio"])] * 2 + [json.dumps(turn("broken", "A"))]
    wanted = script.Set("eval/radio.jsonl", "", "", script.radio)
    records, skipped = script.convert(lines, wanted)
    assert len(records) == 1
    assert skipped == 2
    assert records[0]["id"] == "radio-1"


def test_jobs_are_given_other_answers_as_options(script: ModuleType) -> None:
    wanted = script.Set("eval/jobs.jsonl", "", "", script.jobs)
    records, _ = script.convert([json.dumps(record) for record in JOBS], wanted)
    for record in records:
        assert sorted(record["choices"]) == ["Bakers", "Cooks", "Guides", "Nurses"]
        title = record["question"].removesuffix("?").rpartition(" ")[2]
        assert record["choices"][record["answer"]] == f"{title}s"
    assert script.convert([json.dumps(record) for record in JOBS], wanted)[0] == records


@pytest.fixture
def wheel(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the same layout with one record a set, and its digests pinned."""
    system = {"role": "system", "content": "Answer 1 or 0"}
    sarcasm = {"input": [system, {"role": "user", "content": "great"}], "ideal": "1"}
    path, pinned = tmp_path / "evals.whl", []
    with zipfile.ZipFile(path, "w") as archive:
        for wanted in script.SETS:
            name = wanted.parse.__name__
            records = JOBS if name == "jobs" else [CASES.get(name, sarcasm)]
            content = "\n".join(json.dumps(record) for record in records).encode()
            archive.writestr(script.MEMBERS + wanted.member, content)
            digest = hashlib.sha256(content).hexdigest()
            pinned.append(script.Set(wanted.target, wanted.member, digest, wanted.parse))
    monkeypatch.setattr(script, "SETS", tuple(pinned))
    return path


def test_files_are_written_once_and_mended(script: ModuleType, wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    rows = script.prepare(folder, wheel)
    assert [name for name, _, _ in rows] == [wanted.target for wanted in script.SETS]
    assert {name: count for name, count, _ in rows if count != 1} == {"eval/jobs.jsonl": 4}
    file = folder / "eval" / "radio.jsonl"
    before, time = file.read_bytes(), file.stat().st_mtime_ns
    assert script.prepare(folder, None) == rows  # no wheel is needed
    assert file.stat().st_mtime_ns == time
    file.write_bytes(b"cut")
    assert script.prepare(folder, wheel) == rows
    assert file.read_bytes() == before


def test_another_wheel_is_refused(script: ModuleType, wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content + b"\n")
    with pytest.raises(SystemExit, match="nothing was written"):
        script.prepare(tmp_path / "demo", other)
    assert not (tmp_path / "demo").exists()


def test_the_cache_follows_the_environment(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path))
    assert script.cache() == tmp_path
    monkeypatch.delenv("TAIA_CACHE")
    assert script.cache() == Path.home() / ".cache" / "taia"
