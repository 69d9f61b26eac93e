"""`halfbyte export`: each target, and one sentence for what it cannot do."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import halfbyte as hb
from halfbyte.cli.main import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


def told(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_an_archive_to_each_target(tiny_llama, tmp_path):
    pytest.importorskip("gguf")
    archive = tmp_path / "model.nf4dq"
    hb.save_model(hb.load_model(tiny_llama, quantization=hb.HalfbyteConfig()), archive, hb.load_tokenizer(tiny_llama))
    text = told("export", archive, "-o", tmp_path / "model.gguf", "--type", "q8_0")
    assert "15 tensors as q8_0: rounding error 0.00" in text and "5 tensors as f32: exact" in text
    assert "note: 14 tensors were nf4: they are decoded" in text
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    text = told("export", archive, "-o", tmp_path / "dense", "--to", "safetensors", "--dtype", "float16")
    assert "dense, float16" in text and str(tmp_path / "dense") in text
    assert "quantized" in told("export", archive, "-o", tmp_path / "bnb", "--to", "bitsandbytes")
    assert told("generate", tmp_path / "bnb", "-p", "abc", "--max-new-tokens", 4) == told(
        "generate", archive, "-p", "abc", "--max-new-tokens", 4
    )


def test_an_adapter(tiny_llama, tmp_path):
    pytest.importorskip("gguf")
    from peft import LoraConfig, get_peft_model

    get_peft_model(hb.load_model(tiny_llama), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "a"
    )
    assert "4 tensors as f32: exact" in told("export", tmp_path / "a", "-o", tmp_path / "one.gguf")
    told("export", tiny_llama, "--adapter", tmp_path / "a", "-o", tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert "leave --adapter out" in refused("export", tmp_path / "a", "--adapter", tmp_path / "a", "-o", "x.gguf")
    said = refused("export", tmp_path / "a", "-o", tmp_path / "x", "--to", "safetensors")
    assert "merge it into its base first" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "out"], "name what out is to be: --to gguf"),
        (["-o", "out", "--to", "safetensor"], "did you mean 'safetensors'"),
        (["-o", "out", "--to", "gguf"], "writes a file that ends in .gguf, not out"),
        (["-o", "out.gguf", "--to", "bitsandbytes"], "writes a folder, not out.gguf"),
        (["-o", "out", "--to", "bitsandbytes", "--type", "f16"], "--type is for GGUF"),
        (["-o", "out.gguf", "--dtype", "float16"], "for --to safetensors"),
        (["-o", "out", "--to", "safetensors", "--dtype", "half"], "--dtype is one of bfloat16"),
        (["-o", "out.gguf", "--type", "q4_k"], "'q4_k' is not offered"),
    ],
)
def test_a_wrong_request_is_one_sentence(tiny_llama, tmp_path, monkeypatch, arguments, said):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    text = refused("export", tiny_llama, *arguments)
    assert said in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["info"], ["generate", "-p", "x"], ["quantize", "-o", "out"]])
def test_a_gguf_file_as_a_model_is_one_sentence(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    text = refused(command[0], "model.gguf", *command[1:])
    assert "model.gguf is a GGUF file, which halfbyte writes and does not read" in text and text.count("\n") == 1
