"""What holds the code base together: the floors, the README's tree, the exported names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import taia

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "taia"
FILES = sorted(SOURCE.rglob("*.py"))

FLOORS = [
    {"cli", "__main__"},
    {"experiment"},
    {"sweep_report", "report_training"},
    {"report", "sweep_scores"},
    {"sweep"},
    {"recipe"},
    {"report_text"},
    {"report_scores", "report_shares"},
    {"report_plots", "sweep_plots"},
    {"evaluation"},
    {"training", "analysis"},
    {"verify", "gguf_verify", "explain"},
    {"splice", "attach", "gguf_splice"},
    {"extract"},
    {"targets"},
    {"filling"},
    {"shards"},
    {"slicing", "pieces"},
    {"downloads"},
    {"card", "load"},
    {"plan", "gguf_plan", "selection_of"},
    {"unstack"},
    {"decisions", "folded"},
    {"parted", "factor_rows"},
    {"adapter", "stored_names"},
    {"switches", "vectors", "ends", "configs", "fused", "experts", "molora", "routing"},
    {"lora", "stacked", "low_rank", "layouts", "quantised"},
    {"changes", "peft_config"},
    {"factorise", "nearly"},
    {"writing", "receipt", "arrays", "gguf_quants", "hashing", "ties"},
    {"selection"},
    {"kinds", "checkpoint", "gguf_kinds", "gguf_header"},
    {"kind_table", "derivation"},
    {"sources", "compare"},
    {"mirror", "holes"},
    {"remote_hub", "remote_storage"},
    {"push"},
    {"remote_http", "transfer"},
    {"remote", "files"},
    {"companions", "index"},
    {"header"},
    {"direct"},
    {"cold", "json_stream", "copying", "workers"},
    {"untrusted", "stopping"},
    {"generation"},
    {"slots", "packed"},
    {"errors"},
]
"""From the top down. A module imports from its own floor and from those below."""


def floor(module: str) -> int:
    return next(level for level, names in enumerate(FLOORS) if module in names)


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path, *, everywhere: bool) -> list[str]:
    """Names of imported modules; of the whole file, or of its top level alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_downwards(file):
    if file == SOURCE / "__init__.py":
        return
    here = floor(name_of(file))
    for module in imports(file, everywhere=True):
        if module.startswith("taia."):
            there = module.split(".")[1]
            # plan unpacks a GGUF file through load when it meets one; load knows no plan
            if (name_of(file), there) != ("plan", "load"):
                assert floor(there) >= here, f"{file.name} imports {module} from above"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_heavy_imports_are_not_at_the_top(file):
    heavy = {"torch", "transformers", "peft", "trl", "lm_eval", "datasets", "accelerate"}
    if file == SOURCE / "molora.py":  # it is made of their classes, and nobody's top imports it
        return
    assert "taia.molora" not in imports(file, everywhere=False)
    assert not heavy & {module.split(".")[0] for module in imports(file, everywhere=False)}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_every_module_says_what_it_is_and_stays_short(file):
    text = file.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 400


def test_exported_names_are_there_and_sorted_by_home():
    for name in taia.__all__:
        assert getattr(taia, name) is not None
    with pytest.raises(AttributeError):
        taia.nothing_of_this_name  # noqa: B018


def test_importing_taia_imports_next_to_nothing():
    code = (
        "import sys; before = set(sys.modules); import taia\n"
        "added = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert added <= {'taia', *sys.stdlib_module_names}, added\n"
        "assert [name for name in sys.modules if name.startswith('taia.')] == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_has_its_home():
    assert sorted(taia._HOMES) == sorted(taia.__all__)


@pytest.mark.parametrize("name", [n for n in taia.__all__ if (SOURCE / f"{n}.py").is_file()])
@pytest.mark.parametrize("first", ["module", "function"])
def test_functions_that_share_a_module_name_stay_functions(name, first):
    module = (
        f"import taia.{name}\n"
        f"from taia.{name} import {name} as function\n"
        f"assert taia.{name} is function\n"
        f"assert sys.modules['taia.{name}'].{name} is function\n"
    )
    function = f"assert callable(taia.{name}) and taia.{name}.__name__ == {name!r}\n"
    lines = [module, function] if first == "module" else [function, module, function]
    code = "import sys, taia\n" + "".join(lines)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tree_of_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## The tree\n\n(.*?)\n\n", text, re.DOTALL)
    assert block
    told, folders = set(), []
    for line in block[1].splitlines():
        match = re.match(r"^    ( *)(\S+/|\S+(?=\s{2,}\S))", line)
        assert match, f"no comment: {line}"
        depth = len(match[1]) // 2
        folders = [*folders[:depth], match[2].rstrip("/")]
        if not match[2].endswith("/"):
            told.add("/".join(folders))
    listed = subprocess.run(
        ["git", "ls-files", "src", "tools", "benchmarks", "recipes", "docs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    kept = {
        name for name in listed
        if not name.endswith(("__init__.py", "__main__.py", "py.typed"))
        and "/tasks/" not in name
        and "/figures/" not in name
    }  # fmt: skip
    assert told - {"src/taia/evaluation/tasks"} == kept


def test_constraints_pin_everything_exactly():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins


def test_no_file_names_a_machine():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    home = re.compile(r"(?<![\w./])/(root|work)/\w")
    for name in listed:
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".jinja", ""}:
            assert not home.search(path.read_text(encoding="utf-8")), name
