"""Several processes: the command says in a sentence that it runs in one."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.errors import RequestError
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train


def test_a_launcher_of_several_processes_is_refused_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = make_recipe({"model_name_or_path": "m", "output_dir": str(tmp_path / "o"), "dataset": "d"})
    with pytest.raises(RequestError, match="in one process, and a launcher has started 2; start it without torchrun"):
        train(recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
