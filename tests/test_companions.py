"""Which files beside the weights are copied, and that a receipt covers each of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
from http_tools import Answering, serve

import taia
from taia.companions import COMPANIONS, TEMPLATES, file_of, files_in, fits
from taia.errors import CheckpointError, VerificationError
from taia.remote import Stated, matches

NEW = (f"{TEMPLATES}/rag.jinja", f"{TEMPLATES}/tool_use.jinja", "source.spm", "target.spm",
       "target_vocab.json")  # fmt: skip


@pytest.fixture
def models(pair, tmp_path):
    """A base, and a tuned model with several chat templates and the files of a Marian."""
    base, tuned = pair("llama")
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(tuned, tmp_path / "tuned")
    (tmp_path / "tuned" / TEMPLATES).mkdir()
    for name in NEW:
        (tmp_path / "tuned" / name).write_text(f"what {name} says")
    return tmp_path / "base", tmp_path / "tuned"


def test_templates_and_sentencepiece_files_are_copied_and_in_the_receipt(models, tmp_path):
    base, tuned = models
    (tuned / TEMPLATES / "weights.safetensors").write_text("no template")
    (tuned / "another").mkdir()
    (tuned / "another" / "x.jinja").write_text("elsewhere")
    receipt = taia.splice(base, tuned, tmp_path / "out")
    assert set(NEW) <= set(receipt.files)
    for name in NEW:
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    assert len(list((tmp_path / "out" / TEMPLATES).iterdir())) == 2
    assert not (tmp_path / "out" / "another").exists()
    taia.verify(tmp_path / "out")
    extracted = taia.extract(base, tuned, tmp_path / "extracted", 2)
    assert extracted is not None
    assert set(NEW) <= set(taia.verify(tmp_path / "extracted").files)


def test_a_sliced_adapter_has_its_templates(adapters, tmp_path):
    base, adapter = adapters("llama", "plain")
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / TEMPLATES).mkdir()
    (tmp_path / "adapter" / NEW[0]).write_text("a template")
    taia.splice(base, tmp_path / "adapter", tmp_path / "out")
    assert NEW[0] in taia.verify(tmp_path / "out").files


def _alter(folder: Path) -> None:
    (folder / NEW[0]).write_text("something else")


def _remove(folder: Path) -> None:
    (folder / NEW[0]).unlink()


def _add(folder: Path) -> None:
    (folder / TEMPLATES / "more.jinja").write_text("more")


def _nest(folder: Path) -> None:
    (folder / TEMPLATES / "deep").mkdir()


def _link(folder: Path) -> None:
    shutil.move(folder / TEMPLATES, folder.parent / "moved")
    (folder / TEMPLATES).symlink_to(folder.parent / "moved")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_alter, f"{NEW[0]}: altered"),
        (_remove, f"{NEW[0]}: missing"),
        (_add, f"{TEMPLATES}/more.jinja: not written by taia"),
        (_nest, f"{TEMPLATES}/deep: not written by taia"),
        (_link, f"{TEMPLATES}: not written by taia"),
    ],
)
def test_verify_looks_at_the_templates(models, tmp_path, change, told):
    taia.splice(*models, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(VerificationError) as caught:
        taia.verify(tmp_path / "out")
    assert told in str(caught.value)


@pytest.mark.parametrize("name", [f"{TEMPLATES}/../secret", f"{TEMPLATES}/a/b", "other/x.jinja"])
def test_a_receipt_that_names_another_folder_is_told(models, tmp_path, name):
    receipt = taia.splice(*models, tmp_path / "out")
    text = (tmp_path / "out" / "taia.json").read_text()
    (tmp_path / "out" / "taia.json").write_text(text.replace(f'"{NEW[0]}"', f'"{name}"'))
    (tmp_path / "out" / TEMPLATES / "secret").write_text("secret")
    with pytest.raises(VerificationError, match="names a file outside the folder"):
        taia.verify(tmp_path / "out")
    assert receipt.files


def test_links_out_of_the_model_are_refused(models, tmp_path):
    base, tuned = models
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.jinja").write_text("a secret")
    (tuned / NEW[0]).unlink()
    (tuned / NEW[0]).symlink_to(tmp_path / "private" / "key.jinja")
    with pytest.raises(CheckpointError, match="leads out of the model's folder"):
        taia.splice(base, tuned, tmp_path / "out")
    shutil.rmtree(tuned / TEMPLATES)
    (tuned / TEMPLATES).symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match="a link; put the folder itself there"):
        taia.splice(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs(models, tmp_path):
    base, tuned = models
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    shutil.copytree(tuned, snapshot)
    blob = tmp_path / "models--a--b" / "blobs" / "4567"
    shutil.move(snapshot / NEW[0], blob)
    (snapshot / NEW[0]).symlink_to(Path("../../../blobs/4567"))
    taia.splice(base, snapshot, tmp_path / "out")
    assert (tmp_path / "out" / NEW[0]).read_bytes() == blob.read_bytes()
    (snapshot / NEW[0]).unlink()
    (snapshot / NEW[0]).symlink_to(Path("../tokenizer.json"))
    (snapshot / "tokenizer.json").write_text("inside")
    taia.splice(base, snapshot, tmp_path / "again")
    assert (tmp_path / "again" / NEW[0]).read_text() == "inside"


def test_a_storage_gives_the_templates(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for folder in models:
        memory.put(str(folder), f"/companions/{folder.name}", recursive=True)
    taia.splice("memory://companions/base", "memory://companions/tuned", tmp_path / "out")
    assert set(NEW) <= set(taia.verify(tmp_path / "out").files)


def test_a_web_server_is_asked_for_the_names_that_models_use(models):
    from taia.remote_http import http_remote

    class Handler(Answering):
        def do_HEAD(self):
            file = models[1] / self.path[1:]
            self._send(200 if file.is_file() else 404, {}, b"12345" if file.is_file() else b"")

    server, url = serve(Handler)
    try:
        found = http_remote(url).find(COMPANIONS)
    finally:
        server.shutdown()
        server.server_close()
    assert set(NEW) <= set(found)


def test_the_hub_s_list_has_the_templates_and_no_other_folder():
    from types import SimpleNamespace

    from taia.remote_hub import _files_of

    names = ["config.json", *NEW, f"{TEMPLATES}/a/b.jinja", "original/x.jinja", "../x.jinja"]
    listed = [SimpleNamespace(rfilename=f"in/{n}", size=5, lfs=None, blob_id="1") for n in names]
    found = _files_of("hub", SimpleNamespace(siblings=listed), "in")
    assert set(found) == {"config.json", *NEW}
    assert all(isinstance(stated, Stated) for stated in found.values())


def test_a_whole_snapshot_is_the_folder_above_its_templates(tmp_path, monkeypatch):
    import huggingface_hub

    from taia.remote_hub import HubAddress, local_snapshot

    names = ("in/config.json", f"in/{NEW[0]}")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                        lambda _, name, **__: str(tmp_path / name))  # fmt: skip
    files = {name.removeprefix("in/"): Stated(5) for name in names}
    assert local_snapshot(HubAddress("a/b", "0", "in"), files) == tmp_path / "in"


@pytest.mark.parametrize(
    ("name", "there"),
    [
        (f"{TEMPLATES}/a.jinja", True),
        (f"{TEMPLATES}/.jinja", True),
        (f"{TEMPLATES}/../a.jinja", False),
        (f"{TEMPLATES}//a.jinja", False),
        (f"{TEMPLATES}/", False),
        (f"{TEMPLATES}/a\\b.jinja", False),
        (f"/{TEMPLATES}/a.jinja", False),
        (f"{TEMPLATES}/{TEMPLATES}/a.jinja", False),
        ("other/a.jinja", False),
        ("source.spm", True),
    ],
)
def test_what_a_server_names_stays_in_the_folder(name, there):
    assert matches(name, COMPANIONS) == there


def test_a_star_does_not_reach_into_a_folder(tmp_path):
    assert fits("a.jinja", ["*.jinja"])
    assert not fits(f"{TEMPLATES}/a.jinja", ["*.jinja"])
    assert file_of(f"{TEMPLATES}/a.jinja") == "a.jinja"
    (tmp_path / TEMPLATES).mkdir()
    (tmp_path / TEMPLATES / "a").touch()
    (tmp_path / "z").touch()
    assert files_in(tmp_path, ["z"]) == [f"{TEMPLATES}/a"]
