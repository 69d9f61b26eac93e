"""The recipe: all mistakes at once, each with the nearest valid choice; paths; round trip; the shipped examples."""

from __future__ import annotations

import pytest

from halfbyte.data import Source
from halfbyte.errors import RecipeError
from halfbyte.train.recipe import Recipe, load_recipe, make_recipe

NEEDED = {"model_name_or_path": "/m", "output_dir": "o", "dataset": "d.jsonl"}


def test_all_mistakes_are_told_at_once_with_the_nearest_choice(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model_name_or_path: m\noutput_dir: o\nlora_rank: 4\nmethod: qlorra\nformat: nf5\nblock_size: 65\n"
        "scale_bits: 5\nlora_dropout: 2\neval_steps: 5\nlearning_rate: fast\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["max_lenght=7", "nonsense"])
    told = "\n".join(caught.value.mistakes)
    for expected in (
        "'lora_rank'; did you mean 'lora_r'?",
        "method is 'qlorra', which is not offered; did you mean 'qlora'?",
        "format is 'nf5', which is not offered; did you mean 'nf4'?",
        "block_size is 65, which is not offered; the nearest is 64",
        "scale_bits is 5, which is not offered; choose one of: 4, 6, 8, null.",
        "lora_dropout is 2 and should be less than 1.",
        "learning_rate is 'fast'",
        "the key 'dataset' is missing",
        "eval_steps is 5 but eval_dataset is not set",
        "'max_lenght'; did you mean 'max_length'?",
        "'nonsense' is not of the form key=value",
    ):
        assert expected in told
    assert len(caught.value.mistakes) == 11


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (None, None),
        ("experts", "experts"),
        ([], ()),
        ("experts.down_proj", ("experts.down_proj",)),
        (["a.b", "c"], ("a.b", "c")),
    ],
)
def test_experts_are_named_by_a_group_or_by_parameters(given, held):
    assert make_recipe({**NEEDED, "target_parameters": given}).target_parameters == held


def test_a_group_of_one_key_is_a_name_to_another():
    assert make_recipe({**NEEDED, "target_modules": "experts"}).target_modules == ("experts",)
    assert make_recipe({**NEEDED, "target_parameters": "attention"}).target_parameters == ("attention",)
    with pytest.raises(RecipeError, match=r"target_parameters is 3, which is not offered; .* or a list of names"):
        make_recipe({**NEEDED, "target_parameters": 3})


def test_a_metric_that_the_task_does_not_have_is_refused():
    for task, metric, choice in (
        ("causal-lm", "accuracy", "exact_match"),
        ("sequence-classification", "exact_match", "accuracy"),
    ):
        with pytest.raises(RecipeError, match=f"eval_metric is '{metric}' but task is '{task}'.*choose {choice}"):
            make_recipe({**NEEDED, "eval_dataset": "e", "task": task, "eval_metric": metric})
    with pytest.raises(RecipeError) as caught:
        make_recipe({**NEEDED, "eval_dataset": "e", "task": "classification", "eval_metric": "accuracy"})
    (told,) = caught.value.mistakes  # nothing is concluded from a task that is not offered
    assert "task is 'classification', which is not offered; did you mean 'token-classification'?" in told


def test_paths_are_relative_to_the_file_and_overrides_to_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "base").mkdir()
    (tmp_path / "there" / "r.yaml").write_text("model_name_or_path: base\noutput_dir: ../runs\ndataset: [a, b]\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(tmp_path / "there" / "r.yaml", ["dataset=mine.jsonl"])
    assert recipe.model_name_or_path == str(tmp_path / "there" / "base")
    assert recipe.output_dir == str(tmp_path / "runs")
    assert recipe.dataset == (Source(str(tmp_path / "here" / "mine.jsonl")),)


def test_a_hub_name_stays_a_name(tmp_path):
    (tmp_path / "r.yaml").write_text("model_name_or_path: meta-llama/Llama-3.2-1B\noutput_dir: o\ndataset: d\n")
    assert load_recipe(tmp_path / "r.yaml").model_name_or_path == "meta-llama/Llama-3.2-1B"


def test_a_recipe_is_frozen_and_survives_its_own_yaml(tmp_path):
    recipe = make_recipe({**NEEDED, "output_dir": "/o", "dataset": ["/d"], "target_modules": ["q_proj"], "lora_r": 3})
    with pytest.raises(ValueError, match="frozen"):
        recipe.lora_r = 4
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert load_recipe(tmp_path / "r.yaml").digest == recipe.digest


def test_every_shipped_recipe_is_valid(repository):
    paths = sorted((repository / "examples").glob("*.yaml"))
    assert paths
    for path in paths:
        recipe = load_recipe(path)
        assert isinstance(recipe, Recipe)
        assert recipe.output_dir.startswith(str(repository / "runs"))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a.json", [("a.json", None)]),
        (["a.json", "b"], [("a.json", None), ("b", None)]),
        ({"a.json": 3, "b": 0.5}, [("a.json", 3), ("b", 0.5)]),
        ([{"path": "a.json", "weight": 2}, "b"], [("a.json", 2), ("b", None)]),
        ({"path": "a.json", "split": "test"}, [("a.json", None)]),
    ],
)
def test_datasets_are_named_in_several_ways(tmp_path, written, read):
    recipe = make_recipe({**NEEDED, "dataset": written})
    assert [(source.path, source.weight) for source in recipe.dataset] == read
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "r.yaml")
    assert [(source.path, source.weight) for source in again.dataset] == [(str(tmp_path / p), w) for p, w in read]
    assert load_recipe(tmp_path / "r.yaml", [f"dataset=[{tmp_path}/x, someone/something]"]).dataset == (
        Source(f"{tmp_path}/x"),
        Source("someone/something"),
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dataset", {"a": 0}, "has the weight 0; a weight is a number above 0."),
        ("dataset", {"a": "much"}, "has the weight 'much'; a weight is a number above 0."),
        ("dataset", [{"path": "a", "wieght": 1}], "has the unknown entry 'wieght'; did you mean 'weight'?"),
        ("dataset", [{"weight": 1}], "must be a name, a list of names, or a mapping of names to weights."),
        ("dataset", 3, "must be a name, a list of names, or a mapping of names to weights."),
        ("dataset", [], "dataset is "),
        ("dataset", {"path": "a", "split": 3}, "has the split 3, which must be text."),
        ("eval_split", 0, "eval_split is 0 and should be greater than 0."),
        ("eval_split", 1.5, "eval_split is 1.5, which is neither a share below 1 nor a number of rows."),
        ("train_on", "answers", "train_on is 'answers', which is not offered; choose one of: completion, all_assist"),
    ],
)
def test_data_keys_that_are_wrong_are_one_sentence(key, value, expected):
    with pytest.raises(RecipeError) as caught:
        make_recipe({**NEEDED, key: value})
    (told,) = caught.value.mistakes
    assert expected in told


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"eval_split": 0.1, "eval_dataset": "e"}, "eval_dataset and eval_split are both set"),
        ({"packing": True, "task": "sequence-classification"}, "packing is true but task is 'sequence-classification'"),
        ({"group_by_length": True, "task": "preference"}, "group_by_length is true but task is 'preference'"),
    ],
)
def test_data_keys_that_do_not_go_together(keys, expected):
    with pytest.raises(RecipeError, match=expected):
        make_recipe({**NEEDED, **keys})
    make_recipe({**NEEDED, "eval_split": 0.1, "eval_metric": "exact_match", "eval_steps": 3})


@pytest.mark.parametrize(
    ("keys", "local"),
    [
        ({}, True),
        ({"dataset": "owner/data"}, False),
        ({"eval_dataset": ["e.json", "owner/data"]}, False),
        ({"model_name_or_path": "owner/model"}, False),
        ({"dataset": "owner/data.jsonl"}, True),
    ],
)
def test_a_recipe_of_local_names_needs_no_network(keys, local):
    assert make_recipe({**NEEDED, **keys}).is_local is local
