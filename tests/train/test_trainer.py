"""The numbers of training: one division of the loss, savers that change nothing, float32 masters, a named NaN."""

from __future__ import annotations

import pytest
import torch

from halfbyte.data import Example, Renderer, tokenize
from halfbyte.errors import NonFiniteError
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import add_adapter


@pytest.fixture(scope="module")
def rows(tiny_tokenizer):
    """Answers of very unequal length: a mean of means would be far from the mean over tokens."""
    lengths = [1, 40, 3, 25, 2, 2, 30, 1]
    turns = [
        ({"role": "user", "content": "q"}, {"role": "assistant", "content": "xyz"[i % 3] * n})
        for i, n in enumerate(lengths)
    ]
    examples = [Example("row", pair) for pair in turns]
    return tokenize(examples, Renderer(tiny_tokenizer), max_length=64, train_on="completion").dataset


@pytest.fixture
def make_trainer(tiny_llama, tiny_tokenizer, rows, tmp_path):
    def make(fused=True, **keys):
        from transformers import set_seed

        from halfbyte.models import load_model
        from halfbyte.train.trainer import Trainer

        defaults = {"method": "lora", "compute_dtype": "float32", "lora_r": 4, "max_steps": 1}
        paths = {
            "model_name_or_path": str(tiny_llama),
            "output_dir": str(tmp_path),
            "dataset": "d",
            "eval_dataset": "d",
        }
        recipe = make_recipe(paths | defaults | keys)
        set_seed(0)
        base = load_model(tiny_llama, dtype=torch.float32, fused=fused)
        model = add_adapter(base, recipe, "all-linear")
        return Trainer(
            model, recipe, rows=rows, eval_rows=rows, tokenizer=tiny_tokenizer, folder=tmp_path, callbacks=[]
        )

    return make


def gradients_of_one_step(trainer):
    from transformers import TrainerCallback

    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    return torch.cat([grad.flatten() for grad in found.values()]), trainer.state.log_history


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# Eight rows a step, no clipping. 1e-6: float32's resolution is 1.2e-7, and sums that are taken in another order have
# been seen to differ by 1.6e-7 to 2.9e-7.
WHOLE = {"per_device_train_batch_size": 8, "max_grad_norm": 1e9, "logging_steps": 1}


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_accumulation_gives_equal_gradients_and_loss(make_trainer, steps):
    wanted, log = gradients_of_one_step(make_trainer(**WHOLE))
    assert wanted.norm() > 0
    split = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    got, split_log = gradients_of_one_step(make_trainer(**WHOLE | split))
    assert relative(got, wanted) < 1e-6
    assert split_log[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("size", [8, 2])
def test_the_order_of_rows_gives_equal_gradients_and_loss(make_trainer, rows, size):
    """Other neighbours, and so other padding, and other micro-batches."""
    wanted, log = gradients_of_one_step(make_trainer(**WHOLE))
    trainer = make_trainer(**WHOLE | {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size})
    trainer.train_dataset = rows.select([3, 0, 6, 5, 1, 7, 2, 4])
    got, other_log = gradients_of_one_step(trainer)
    assert relative(got, wanted) < 1e-6
    assert other_log[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-6)


def test_padding_on_the_left_gives_equal_gradients_and_loss(make_trainer, monkeypatch):
    """Nothing depends on where the padding stands, as long as the model's positions are relative."""
    from halfbyte.data import pad_rows
    from halfbyte.train import trainer

    def pad_left(rows, pad_id):
        batch = pad_rows(rows, pad_id)
        for index, row in enumerate(rows):
            for column in batch.values():
                column[index] = column[index].roll(column.shape[1] - len(row["input_ids"]))
        return batch

    wanted, log = gradients_of_one_step(make_trainer(**WHOLE))
    monkeypatch.setattr(trainer, "pad_rows", pad_left)
    got, left_log = gradients_of_one_step(make_trainer(**WHOLE))
    assert relative(got, wanted) < 1e-6
    assert left_log[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-6)


def test_the_models_loss_and_trls_give_equal_gradients(make_trainer):
    """trl's fused head is what a model trains with whose own loss is not chunked."""
    trainer, other = make_trainer(**WHOLE), make_trainer(fused=False, **WHOLE)
    assert trainer.model_has_loss
    assert not other.model_has_loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], rel=1e-5)
    (got, log), (wanted, other_log) = gradients_of_one_step(trainer), gradients_of_one_step(other)
    assert relative(got, wanted) < 1e-5
    for key in ("loss", "num_tokens"):
        assert next(e[key] for e in log if key in e) == pytest.approx(
            next(e[key] for e in other_log if key in e), rel=1e-5
        )


@pytest.mark.parametrize("packing", [False, True])
def test_the_trainer_says_what_attention_is_for(make_trainer, monkeypatch, packing):
    from halfbyte.train import guards

    said = []
    monkeypatch.setattr(guards, "set_attention", lambda model, device, packed: said.append((model, device, packed)))
    trainer = make_trainer(packing=packing)
    assert said == [(trainer.model.get_base_model(), trainer.args.device, packing)]


def test_one_process_trains_on_one_card(make_trainer, monkeypatch):
    """transformers would wrap the model in DataParallel, which copies it to every card before each step."""
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2 if self._n_gpu == 0 else self._n_gpu))
    trainer = make_trainer(per_device_train_batch_size=2)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2
    assert trainer._wrap_model(trainer.model) is trainer.model


def test_gradient_checkpointing_gives_equal_gradients(make_trainer):
    """The frozen embedding is the trap: without gradients at the inputs, the first layers would get none."""
    wanted, _ = gradients_of_one_step(make_trainer(**WHOLE))
    got, _ = gradients_of_one_step(make_trainer(**WHOLE, gradient_checkpointing=True))
    assert got.shape == wanted.shape
    assert relative(got, wanted) < 1e-5


def test_the_loss_is_the_mean_over_trained_tokens(make_trainer, rows):
    trainer = make_trainer(**WHOLE)
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = trainer.model(input_ids=ids).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            count += (labels[1:] != -100).sum().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    other = make_trainer(**WHOLE, per_device_eval_batch_size=3)
    assert other.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert gradients_of_one_step(trainer)[1][-2]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("says_4bit", [False, True])
def test_adapters_are_float32_masters_under_bfloat16(make_trainer, says_4bit, monkeypatch):
    """trl rounds the adapters of a model that says it is 4-bit to bfloat16."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "is_loaded_in_4bit", says_4bit, raising=False)
    trainer = make_trainer(compute_dtype="bfloat16", learning_rate=1e-6, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            if "lora_A" in name:  # a step of 1e-6 is lost in bfloat16, whose resolution at 0.1 is 5e-4
                assert relative(before[name].bfloat16().float(), before[name]) > 1e-4
    moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in trainer.model.named_parameters() if n in before}
    assert 0 < max(moved.values()) < 1e-5


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_what_is_frozen_is_never_cast_up_for_good(tiny_llama, tiny_tokenizer, rows, tmp_path, method):
    """Embeddings, head and norms in float32 cost gigabytes (peft#816); the tied head stays the embeddings' memory."""
    from halfbyte.train.sft import load_base
    from halfbyte.train.trainer import Trainer

    paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path), "dataset": "d"}
    recipe = make_recipe({**paths, "method": method, "lora_r": 4, "max_steps": 2, "gradient_checkpointing": True})
    model = add_adapter(load_base(recipe), recipe, "all-linear")
    trainer = Trainer(model, recipe, rows=rows, eval_rows=rows, tokenizer=tiny_tokenizer, folder=tmp_path, callbacks=[])
    trainer.train()
    trainer.evaluate()
    dtypes = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    assert len(dtypes) > 15
    assert set(dtypes.values()) == {torch.bfloat16}
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_evaluation_never_makes_the_logits_of_a_batch(make_trainer, monkeypatch):
    """transformers gathers them, and runs out of memory where training fits (transformers#8476)."""
    trainer = make_trainer()
    assert trainer.model_has_loss
    head, forward = trainer.model.get_output_embeddings(), torch.nn.Linear.forward

    def watched(self, x):  # on the class, since a head with a hook is no plain one and would be asked
        assert self is not head, "the head was asked for logits"
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(AssertionError, match="asked for logits"):
        trainer.model.eval()(input_ids=torch.tensor([[1, 2, 3]]))


def test_float16_skips_an_overflow_and_stops_when_every_step_has_one(make_trainer):
    """On the CPU too. The scaler starts at 2^16 and halves at each skipped step."""
    trainer = make_trainer(compute_dtype="float16", max_steps=40)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    name, poisoned = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    poisoned.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=rf"step 18: the gradient of {name} is not finite"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_a_loss_that_is_not_finite_stops_the_run_and_is_traced(make_trainer):
    trainer = make_trainer(max_steps=3)
    with torch.no_grad():
        trainer.model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"step 1 is nan.*the output of .*layers\.1\.mlp\.up_proj"):
        trainer.train()


def test_tokens_of_packed_rows_are_counted_without_padding():
    from halfbyte.train.trainer import count_tokens

    batch = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 0, 1]])}
    assert count_tokens(batch) == 5 + 7
