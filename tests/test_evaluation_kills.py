"""Killed evaluations, cells in several processes, and what was computed before.

SIGKILL at random moments of a real process; the same command goes on, and its results are those
of a run that nobody killed.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from taia.errors import EvaluationError
from taia.evaluation import cache as scores
from taia.evaluation import harness
from taia.evaluation.cache import Cache, others, place
from taia.evaluation.part import open_part
from taia.evaluation.result import Example, read_results
from taia.evaluation.variants import identity
from taia.sources import Form, Source

EXAMPLES = 24
SLOW = (
    "import sys, time; from taia.evaluation import harness, scoring; plain = scoring._Asked._take\n"
    "def slowly(*given):\n    time.sleep(0.05); return plain(*given)\n"
    "scoring._Asked._take = slowly\n"
    "harness.evaluate(sys.argv[1], sys.argv[2], tasks=['csqa', 'gsm8k'], data=sys.argv[3], "
    "adapter=sys.argv[4], variants=['base', 'taia'], dtype='float32', batch_size=3, cache=False)"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny base, an adapter, and the data of a task of choices and of a task of texts."""
    from adapter_tools import save_adapter
    from chat_tools import tiny_chat_model

    folder, pick = tmp_path_factory.mktemp("inputs"), random.Random(0)
    base = tiny_chat_model(folder / "base", "float32")
    adapter = save_adapter(base, folder / "adapter", r=4, lora_alpha=8)
    choice = [{"id": f"c{n}", "question": f"{n}" + "?" * pick.randint(1, 30), "answer": n % 3,
               "choices": ["a", "bc", "abc"]} for n in range(EXAMPLES)]  # fmt: skip
    text = [{"id": f"t{n}", "question": f"{n}+1?", "answer": str(n + 1), "solution": f"{n + 1}"}
            for n in range(4)]  # fmt: skip
    for name, rows in (("csqa", choice), ("gsm8k", text)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base, adapter, folder


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Options, and a run that nobody killed."""
    base, adapter, data = inputs
    options = {"tasks": ["csqa", "gsm8k"], "data": data, "adapter": adapter, "batch_size": 3,
               "variants": ["base", "taia"], "dtype": "float32", "cache": False}  # fmt: skip
    out = tmp_path_factory.mktemp("whole") / "run"
    return options, out, harness.evaluate(base, out, **options)


def examples_of(out):
    return read_results(out).examples


@pytest.mark.slow
def test_a_killed_run_goes_on(inputs, whole, tmp_path):
    base, adapter, data = inputs
    pick, out, kills = random.Random(5), tmp_path / "run", 0
    command = [sys.executable, "-c", SLOW, str(base), str(out), str(data), str(adapter)]
    for _ in range(4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        begun = time.monotonic()
        while not list(out.rglob("*.part")) and process.poll() is None:
            assert time.monotonic() < begun + 120
            time.sleep(0.01)
        time.sleep(pick.uniform(0, 0.8))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        for part in out.rglob("*.part"):
            lines = part.read_bytes().splitlines(keepends=True)
            ids = [json.loads(line)["id"] for line in lines if line.endswith(b"\n")]
            assert len(ids) == len(set(ids))
    assert kills >= 2
    summary = harness.evaluate(base, out, **whole[0])
    assert examples_of(out) == examples_of(whole[1])
    assert summary == whole[2]
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
def test_a_request_to_stop_is_no_fault_of_the_evaluation(inputs, whole, tmp_path):
    base, adapter, data = inputs
    out, code = tmp_path / "run", SLOW.replace("time.sleep(0.05)", "signal.raise_signal(15)")
    listening = "import signal; from taia.stopping import listen; listen(); " + code
    command = [sys.executable, "-c", listening, str(base), str(out), str(data), str(adapter)]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (stopped.returncode, "EvaluationError" in stopped.stderr) == (143, False)
    assert harness.evaluate(base, out, **whole[0]) == whole[2]


@pytest.mark.slow
def test_a_part_is_gone_on_with(inputs, whole, tmp_path, monkeypatch):
    """In one process: the second batch fails, the next call computes what is missing alone."""
    from taia.evaluation import engine

    options, there, summary = whole
    real, calls = engine.score_batch, []

    def failing(reader, batch, prefix):
        calls.append(batch.requests)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(reader, batch, prefix)

    monkeypatch.setattr(engine, "score_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(inputs[0], tmp_path / "run", **options)
    part = tmp_path / "run" / "results" / "base" / "csqa.jsonl.part"
    kept = part.read_bytes()
    assert len(kept.splitlines()) == 6
    part.write_bytes(kept + b'{"task": "csq')  # a cut line, as a kill may leave it
    first = calls[:2]
    calls.clear()
    calls.extend([set(), set(), set()])
    assert harness.evaluate(inputs[0], tmp_path / "run", **options) == summary
    assert not any(done in calls[3:9] for done in first)
    assert examples_of(tmp_path / "run") == examples_of(there)


@pytest.mark.slow
def test_a_line_of_another_prompt_is_computed_again(inputs, whole, tmp_path):
    options, there, summary = whole
    lines = (there / "results/taia/csqa.jsonl").read_text().splitlines()
    stale = [json.loads(line) | {"prompt_hash": "0" * 16, "correct": 0.0} for line in lines[:5]]
    job = harness.begin(harness.prepare(inputs[0], tmp_path / "run", **options))
    file = job.file(job.asked.variants[1], "csqa")
    with open_part(file) as part:
        part.append([Example.from_json(json.dumps(one)) for one in stale])
        part.append([Example.from_json(line) for line in lines[5:7]])
    for variant in ("base", "taia"):
        for task in ("csqa", "gsm8k"):
            assert harness.score_cell(job, variant, task).is_file()
    assert harness.finish(job) == summary
    assert examples_of(tmp_path / "run") == examples_of(there)


@pytest.mark.slow
def test_cells_are_scored_in_any_order_and_once(inputs, whole, tmp_path):
    import pickle

    options, there, summary = whole
    job = harness.begin(harness.prepare(inputs[0], tmp_path / "run", **options))
    sent = pickle.loads(pickle.dumps(job))
    for variant, task in (("taia", "gsm8k"), ("base", "gsm8k"), ("taia", "csqa")):
        harness.score_cell(sent, variant, task)
    with pytest.raises(EvaluationError, match="csqa"):
        harness.finish(job)
    with (
        open_part(job.file(job.asked.variants[0], "csqa")),
        pytest.raises(EvaluationError, match="another process"),
    ):
        harness.score_cell(sent, "base", "csqa")
    file = harness.score_cell(sent, "base", "csqa")
    stamp = file.stat().st_mtime_ns
    assert harness.score_cell(sent, "base", "csqa").stat().st_mtime_ns == stamp
    assert harness.finish(job) == summary
    assert examples_of(tmp_path / "run") == examples_of(there)
    with pytest.raises(EvaluationError, match="no cell"):
        harness.score_cell(sent, "vanilla", "csqa")


@pytest.mark.slow
def test_nothing_is_computed_twice_between_runs(inputs, whole, tmp_path, monkeypatch):
    from taia.evaluation import engine, texts

    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    base = inputs[0]
    options = whole[0] | {"cache": True}
    first = harness.evaluate(base, tmp_path / "one", **options)
    assert first == whole[2]

    def never(*_, **__):
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "score_batch", never)
        patched.setattr(texts, "_write", never)
        again = harness.evaluate(base, tmp_path / "two", **options)
        alone = options | {"adapter": None, "variants": ["base"], "tasks": ["csqa"]}
        harness.evaluate(base, tmp_path / "three", **alone)  # the base is any fine-tune's base
        assert again == first
        for changed in ({"variants": ["taif"]}, {"dtype": "bfloat16"}, {"protocol": "plain"}):
            with pytest.raises(EvaluationError, match="computed again"):
                harness.evaluate(base, tmp_path / "four", overwrite=True, **(options | changed))
    assert examples_of(tmp_path / "two") == examples_of(tmp_path / "one")
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    harness.evaluate(base, tmp_path / "five", **(options | {"cache": False}))
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_another_version_is_told_and_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path))
    with scores.open_cache(["model"]) as cache:
        key = cache.key("loglikelihood", ["a", "b"])
        cache.keep({key: (-1.5, True)})
        assert cache.find([key]) == {key: [-1.5, True]}
    old = place()
    assert others() == ""
    monkeypatch.setattr(scores, "SCORING", scores.SCORING + 1)
    with scores.open_cache(["model"]) as cache:
        assert cache.find([key]) == {}
    assert old.name in others()
    assert "Remove" in others()


@pytest.mark.parametrize("content", [b"not a database, but long enough " * 99, b"{}"])
def test_a_damaged_cache_is_an_error_with_its_mend(tmp_path, content):
    path = tmp_path / "scores" / "x.sqlite"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"Remove the file.*--no-cache"):
        Cache(path, ["model"]).find([b"x"])


def test_scopes_do_not_meet(tmp_path):
    one, other = (Cache(tmp_path / "x.sqlite", scope) for scope in (["a"], ["b"]))
    assert one.key("loglikelihood", ["p", "c"]) != other.key("loglikelihood", ["p", "c"])
    assert one.key("generate_until", ["p", {"until": ["a"], "max_gen_toks": 2}]) == one.key(
        "generate_until", ["p", {"max_gen_toks": 2, "until": ["a"]}]
    )
    one.close()
    other.close()


def test_a_lent_tokenizer_is_not_another_ones(inputs, tmp_path, monkeypatch):
    """Two fine-tunes of a base without a template lend it tokenizers that read one text unlike."""
    from chat_tools import byte_tokenizer

    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(inputs[0], tmp_path / "base")
    byte_tokenizer(template=None).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    found = []
    for name, words in (("one", []), ("two", ["??"])):
        shutil.copytree(inputs[1], tmp_path / name)
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(words)
        tokenizer.save_pretrained(tmp_path / name)
        for cache in (True, False):
            out = tmp_path / f"{name}-{cache}"
            harness.evaluate(tmp_path / "base", out, tasks=["csqa"], data=inputs[2], cache=cache,
                             adapter=tmp_path / name, variants=["base"], dtype="float32"
                             )  # fmt: skip
            made = examples_of(out)["base", "csqa"]
            found.append([value for one in made for value in one.loglikelihoods])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[2] == pytest.approx(found[3], abs=1e-4)
    assert found[0] != pytest.approx(found[2], abs=1e-3)


def test_samples_are_not_kept():
    from lm_eval.api.instance import Instance

    from taia.evaluation.scoring import _is_sample

    def asked(**arguments):
        return Instance("generate_until", {}, ("p", {"until": ["a"], **arguments}), 0)

    assert _is_sample(asked(do_sample=True))
    assert _is_sample(asked(temperature=0.7))
    assert not _is_sample(asked())
    assert not _is_sample(asked(do_sample=False, temperature=0.7))
    assert not _is_sample(Instance("loglikelihood", {}, ("p", "c"), 0))


def test_what_was_begun_meanwhile_is_not_relabelled(inputs, whole, tmp_path):
    """Both were prepared before either began: the second must not put its settings there."""
    options = whole[0] | {"tasks": ["csqa"], "variants": ["base"]}
    mine = harness.prepare(inputs[0], tmp_path / "run", **options)
    other = harness.prepare(inputs[0], tmp_path / "run", **(options | {"dtype": "bfloat16"}))
    harness.begin(mine)
    with pytest.raises(EvaluationError, match="dtype"):
        harness.begin(other)
    harness.begin(mine)


def test_a_small_tensor_of_a_large_file_changes_its_identity(tmp_path):
    """A norm lies between the pieces that are read of 80 MB, wherever they are."""
    import numpy as np
    from safetensors.numpy import save_file

    weights = {f"{n:02}.wide": np.zeros(2**20, np.float32) for n in range(20)}
    found = set()
    for value in (0.0, 1.0):
        weights["07.norm"] = np.full(64, value, np.float32)
        save_file(weights, tmp_path / "model.safetensors")
        found.add(identity(Source(str(tmp_path), Form.CHECKPOINT, tmp_path)))
    assert len(found) == 2
