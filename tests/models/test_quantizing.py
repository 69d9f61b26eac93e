"""The stream from a model folder into an archive: pieces, threads, and what goes wrong on the way."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte as hb
from halfbyte.errors import FormatError
from halfbyte.models import checkpoint, quantize_to_archive, quantizing
from halfbyte.models.mapping import is_mapped, let_go, map_file


@pytest.fixture
def in_pieces(monkeypatch):
    """Small tensors as large ones: views of the file, cut into pieces, more underway than may be."""
    monkeypatch.setattr(checkpoint, "_LARGE", 1)
    monkeypatch.setattr(quantizing, "_PIECE", 192)
    monkeypatch.setattr(quantizing, "_UNDERWAY", 2000)
    monkeypatch.setattr(quantizing, "_TRIM_EVERY", 3000)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt", "qwen3", "mixtral", "bert"])
@pytest.mark.parametrize("spec", [{}, {"scale_bits": None}, {"format": "int8", "block_size": 32}])
def test_pieces_give_the_bytes_of_the_whole(folder_of, tmp_path, in_pieces, family, spec):
    task, config = "encoder" if family == "bert" else "causal-lm", hb.HalfbyteConfig(**spec)
    quantize_to_archive(folder_of(family), tmp_path / "streamed.nf4dq", config, task=task)
    model = hb.load_model(folder_of(family), quantization=config, task=task)
    for name, tensor in hb.load_model(tmp_path / "streamed.nf4dq", task=task).state_dict(keep_vars=True).items():
        expected = model.state_dict(keep_vars=True)[name]
        same = (
            expected.same_bytes(tensor) if isinstance(expected, hb.QuantizedTensor) else torch.equal(expected, tensor)
        )
        assert same, name


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_nan_in_a_view_is_refused_by_name_and_leaves_nothing(folder_of, tmp_path, in_pieces, name, bad):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folder_of("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=f"^{name}: the weight holds NaN or Inf"):
        quantize_to_archive(folder, tmp_path / "out.nf4dq", hb.HalfbyteConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("writes", [0, 1, 5, 30])
def test_a_failing_write_is_the_error_and_no_thread_is_left(folder_of, tmp_path, in_pieces, monkeypatch, writes):
    put, left = quantizing.ArchiveWriter._put, [writes]

    def full(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        put(self, *args)

    monkeypatch.setattr(quantizing.ArchiveWriter, "_put", full)
    before = threading.active_count()
    with pytest.raises(hb.errors.OutputError, match="is full; nothing was kept"):
        quantize_to_archive(folder_of("llama"), tmp_path / "out.nf4dq", hb.HalfbyteConfig())
    assert threading.active_count() <= before and not list(tmp_path.iterdir())


def test_pages_that_were_let_go_are_read_again(tmp_path):
    data = torch.randint(0, 256, (100_000,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(data.numpy().tobytes())
    with (tmp_path / "file").open("rb") as file:
        view = map_file(file.fileno(), 100_000, str)
    let_go(view.numpy()[5:99_000])
    assert torch.equal(view, data) and is_mapped(view[50_000:]) and not is_mapped(data)


def test_mappings_come_and_go_in_several_threads(tmp_path):
    """A place that one thread gives back may be another's at once."""
    (tmp_path / "file").write_bytes(bytes(8192))
    failures = []

    def many():
        try:
            with (tmp_path / "file").open("rb") as file:
                for _ in range(1000):
                    assert is_mapped(map_file(file.fileno(), 8192, str))
        except BaseException as error:
            failures.append(error)

    with (tmp_path / "file").open("rb") as file:
        map_file(file.fileno(), 8192, str)  # the first has to come from the main thread
    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
