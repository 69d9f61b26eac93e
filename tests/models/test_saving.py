"""A folder is either whole or not there."""

from __future__ import annotations

import errno
import os

import pytest

import halfbyte as hb
from halfbyte.errors import OutputError
from halfbyte.models import check_output_folder, new_folder


@pytest.fixture(scope="module")
def model(folder_of):
    return hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig())


@pytest.mark.parametrize("how", ["errno", "safetensors"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch, how, existing):
    import transformers.modeling_utils
    from safetensors import SafetensorError

    failures = {
        "errno": OSError(errno.ENOSPC, "No space left on device"),
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    }

    def half_written(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise failures[how]

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", half_written)
    target = tmp_path / "new" / "deep" / "model"
    if existing:
        target.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=f"the disk that holds {target} is full; nothing was kept") as caught:
        hb.save_model(model, target)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bug_in_the_middle_keeps_its_traceback_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as aside:
        (aside / "file").write_text("half")
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_refused_and_untouched(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        hb.save_model(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_no_folder(model, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="out is a file"):
        hb.save_model(model, tmp_path / "out")


def test_an_empty_folder_is_fine_and_the_result_is_readable_by_others(model, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    umask = os.umask(0o022)
    try:
        assert hb.save_model(model, str(target)) == target
    finally:
        os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o755
    assert {"config.json", "model.safetensors"} <= {file.name for file in target.iterdir()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert {file.stat().st_mode & 0o777 for file in target.iterdir()} == {0o644}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(model, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=f"no permission to write into {tmp_path}"):
            hb.save_model(model, tmp_path / "deep" / "out")
    finally:
        tmp_path.chmod(0o700)


def test_permission_is_asked_for_before_any_work(tmp_path, monkeypatch):
    """The same for root, who runs the tests in a container: the answer of os.access decides."""
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    with pytest.raises(OutputError, match=f"no permission to write into {tmp_path}"):
        check_output_folder(tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_permission_lost_while_writing(tmp_path):
    with pytest.raises(OutputError, match="no permission to write"), new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "x")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_goes_beside_it(model, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")))
    hb.save_model(model, tmp_path / "out", tokenizer)
    assert hb.load_tokenizer(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_what_a_killed_run_left_is_taken_away_and_what_runs_is_not(tmp_path):
    left, other, user = (tmp_path / name for name in (".out.abcd1234.partial", ".out2.abcd1234.partial", ".out.mine"))
    for folder in (left, other, user):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    with new_folder(tmp_path / "out") as aside:
        assert not left.exists() and other.exists() and user.exists()
        (aside / "file").write_text("first")
        (tmp_path / "elsewhere").mkdir()
        with new_folder(tmp_path / "elsewhere" / "out"):
            pass
        with pytest.raises(KeyError), new_folder(tmp_path / "out"):
            assert aside.exists()  # the first one runs
            raise KeyError("x")
    assert (tmp_path / "out" / "file").read_text() == "first"
