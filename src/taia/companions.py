"""Which files beside the weights belong to a model, and which of them go into an output.

They lie in the model's folder, by the names that transformers gives them, and in one folder
inside it: a tokenizer with several chat templates has all but the default in TEMPLATES. A name
is then `TEMPLATES/FILE`. Names come from outside, so that folder is never a link, and no other
folder is looked into.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from taia.errors import CheckpointError
from taia.untrusted import refuse_stray_link

__all__ = [
    "COMPANIONS",
    "TEMPLATES",
    "TOKENIZER_FILES",
    "copy_companions",
    "file_of",
    "files_in",
    "fits",
]

TEMPLATES = "additional_chat_templates"
"""The folder of a model whose files belong to it too."""

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "target_vocab.json",
    "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja", f"{TEMPLATES}/*.jinja",
    "chat_template.json", "tekken.json", "bpe.codes", "tokenization_*.py",
)  # fmt: skip
COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "*_processor_config.json", "video_preprocessor_config.json", "configuration_*.py",
    "modeling_*.py", *TOKENIZER_FILES,
)  # fmt: skip
"""Files beside the weights that belong to a model."""


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is, or matches, one of `patterns`; a star does not reach into a folder."""
    return any(
        name == pattern or (name.count("/") == pattern.count("/") and fnmatchcase(name, pattern))
        for pattern in patterns
    )


def file_of(name: str) -> str:
    """The name of a file without the folder that it may lie in."""
    return name.removeprefix(f"{TEMPLATES}/")


def files_in(folder: Path, without: Collection[str] = ()) -> list[str]:
    """The names of all that lies in a model's folder, in order, but those in `without`."""
    names = []
    for file in sorted(folder.iterdir()):
        inside = file.name == TEMPLATES and file.is_dir() and not file.is_symlink()
        names += (
            [f"{TEMPLATES}/{f.name}" for f in sorted(file.iterdir())] if inside else [file.name]
        )
    return [name for name in names if name not in without]


def copy_companions(
    source: Path, folder: Path, patterns: Sequence[str], without: Sequence[str] = ()
) -> None:
    """Copy the files of `source` that match `patterns` and not `without`; content only.

    Weights are none of them, whatever their name: they would overwrite those of the output.
    Raises CheckpointError for a link that leads out of the model.
    """
    import shutil  # slow to load; the weights are being written meanwhile

    unwanted = ("*.safetensors", *without)
    for name in files_in(source):
        file = source / name
        if name == TEMPLATES and file.is_symlink():
            raise CheckpointError(f"{file}: a link; put the folder itself there")
        if fits(name, patterns) and not fits(name, unwanted) and not file.is_dir():
            refuse_stray_link(file, source)  # one that leads nowhere as well
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
