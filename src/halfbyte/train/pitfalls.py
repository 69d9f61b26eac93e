"""What QLoRA users run into, told before a weight is read: why, in figures, and the key that mends it.

These are warnings and no refusals, since each may be meant. What fits is an estimate (`halfbyte.train.footprint`)
beside nine tenths of the memory of the machine or its first GPU; where the system does not say how much there is, only
the learning rate and the rank are looked at. Cheaper remedies come first: what gradient checkpointing alone would mend
is not blamed on the adapter or on the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.formats import QuantSpec
from halfbyte.nn.parts import liger_available
from halfbyte.train.footprint import Footprint, estimate, matrices_of, rounded_down
from halfbyte.train.targets import in_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.device import Machine
    from halfbyte.train.recipe import Recipe
    from halfbyte.train.targets import Outline, Targets

USABLE = 0.9  # of the memory; the rest is the system's, the libraries' and lost between allocations
# Adapters learn best at about ten times the rate of full fine-tuning: the QLoRA paper took 1e-4 to 2e-4, and 1e-5 to
# 5e-5 are what the same models are tuned with whole. DPO takes a tenth of either.
FULL_RATE = {"preference": 5e-6}
USUAL_FULL_RATE = 5e-5
ADVISED = 4  # times FULL_RATE: 2e-4
EATEN = 0.5  # of what is saved
MATTERS = 0.01  # of the memory: what an adapter of a small model costs is nobody's concern
FULL_TRAINING = 12  # bytes of a parameter: a float32 gradient and two moments


@dataclass(frozen=True)
class Setting:
    """What a run is about to do.

    Attributes:
        recipe: as given.
        config: of the model; `outline`: its modules.
        targets: what `check_targets` gave; None for `method: full`.
        length: tokens of the longest row.
        machine: where it runs.
    """

    recipe: Recipe
    config: PretrainedConfig
    outline: Outline
    targets: Targets | None
    length: int
    machine: Machine

    def footprint(self, *, attention: bool = False, **keys: object) -> Footprint:
        """The estimate, with other values for some keys, or with adapters in attention only."""
        adapted = self.targets.adapted if self.targets else {}
        if attention:
            adapted = {name: shape for name, shape in adapted.items() if in_attention(name)}
        recipe = self.recipe.model_copy(update=keys)
        gpu = bool(self.machine.gpus)
        fused = not gpu or liger_available().possible
        return estimate(recipe, self.config, self.outline, adapted, self.length, gpu=gpu, fused=fused)

    @property
    def memory(self) -> int:
        """Bytes of the memory that it runs in; 0: unknown."""
        return self.machine.gpus[0][1] if self.machine.gpus else self.machine.memory

    @property
    def least_activations(self) -> dict[str, bool]:
        """The keys with which activations take as little as they can here."""
        return {"gradient_checkpointing": True, "activation_offloading": bool(self.machine.gpus)}

    def fits(self, footprint: Footprint) -> bool:
        """Whether it does; yes, where nobody knows."""
        return not self.memory or footprint.total <= USABLE * self.memory


def find_pitfalls(setting: Setting) -> list[str]:
    """A warning of one or two sentences for each."""
    checks = (_learning_rate, _checkpointing, _offloading, _host_memory, _targets, _rank, _optimizer_state)
    return [told for check in checks if (told := check(setting))]


def _learning_rate(setting: Setting) -> str:
    recipe = setting.recipe
    limit = FULL_RATE.get(recipe.task, USUAL_FULL_RATE)
    rate = recipe.learning_rate * max(1, recipe.loraplus_lr_ratio)
    if recipe.method == "full" or rate > limit:
        return ""
    return (
        f"learning_rate {recipe.learning_rate:g} is one for full fine-tuning; an adapter starts at nothing and needs "
        f"about ten times as much. Set learning_rate: {ADVISED * limit:g}."
    )


def _checkpointing(setting: Setting) -> str:
    recipe, now = setting.recipe, setting.footprint()
    if recipe.gradient_checkpointing or setting.fits(now):
        return ""
    then, least = setting.footprint(gradient_checkpointing=True), setting.footprint(**setting.least_activations)
    rest = ", and a smaller per_device_train_batch_size or max_length besides"
    if setting.fits(least):
        rest = f", and activation_offloading: true, with which that is {_gb(least.activations)}"
    if setting.fits(then):
        rest = ""
    return (
        f"activations of {recipe.per_device_train_batch_size} x {setting.length:,} tokens take about "
        f"{_gb(now.activations)}, which with {_gb(now.total - now.activations)} for the rest does not fit into "
        f"{_gb(setting.memory)}. Set gradient_checkpointing: true, which keeps {_gb(then.activations)}{rest}."
    )


def _offloading(setting: Setting) -> str:
    recipe, now = setting.recipe, setting.footprint()
    then = setting.footprint(activation_offloading=True)
    if not recipe.gradient_checkpointing or setting.fits(now) or not setting.machine.gpus or not setting.fits(then):
        return ""
    return (
        f"{recipe.per_device_train_batch_size} x {setting.length:,} tokens leave checkpoints of "
        f"{_gb(now.activations - then.activations)}, with which the run takes {_gb(now.total)} of "
        f"{_gb(setting.memory)}. Set activation_offloading: true, which keeps them in {_gb(then.host)} of pinned host "
        "memory."
    )


def _host_memory(setting: Setting) -> str:
    needed, there = setting.footprint().host, setting.machine.memory
    if not there or needed <= USABLE * there:
        return ""
    return (
        f"activation_offloading takes {_gb(needed)} of pinned memory, and this machine has {_gb(there)}. "
        "Set per_device_train_batch_size or max_length lower."
    )


def _targets(setting: Setting) -> str:
    now = setting.footprint(**setting.least_activations)
    if setting.recipe.method == "full" or setting.fits(now):
        return ""
    fewer = setting.footprint(attention=True, **setting.least_activations)
    if not 0 < fewer.trained < now.trained or not setting.fits(fewer):
        return ""
    return (
        f"adapters in all the modules named train {now.trained:,} parameters, and the run takes about {_gb(now.total)} "
        f"of {_gb(setting.memory)} even with gradient checkpointing{' and offloading' * bool(now.host)}. "
        f"Set target_modules: attention{' and target_parameters: []' * bool(setting.recipe.target_parameters)}, with "
        f"which it takes {_gb(fewer.total)}."
    )


def _rank(setting: Setting) -> str:
    recipe, now = setting.recipe, setting.footprint()
    cost = 4 * now.trained + now.gradients + now.state
    if recipe.method == "full" or cost <= MATTERS * setting.memory:
        return ""
    if recipe.method == "qlora":
        bits = QuantSpec(recipe.format, recipe.block_size, recipe.scale_bits).nominal_bits()
        saved, what = now.quantized * (16 - bits) / 8, "quantizing the base saves over 16 bits"
    else:
        linear = matrices_of(setting.outline)
        saved, what = float(FULL_TRAINING * linear), "freezing the base saves"
    if cost <= EATEN * saved:
        return ""
    rank = rounded_down(recipe.lora_r * EATEN / 2 * saved / cost)
    return (
        f"lora_r {recipe.lora_r} makes {now.trained:,} trained parameters, which with gradients and optimizer state "
        f"take {_gb(cost)}: {cost / saved:.0%} of the {_gb(saved)} that {what}. "
        f"Set lora_r: {rank}, or optim: adamw_8bit."
    )


def _optimizer_state(setting: Setting) -> str:
    now = setting.footprint(**setting.least_activations)
    if setting.recipe.optim != "adamw" or setting.fits(now):
        return ""
    then = setting.footprint(optim="adamw_8bit", **setting.least_activations)
    if not setting.fits(then):
        return ""
    return (
        f"float32 optimizer state takes {_gb(now.state)}, and the run about {_gb(now.total)} of {_gb(setting.memory)}. "
        f"Set optim: adamw_8bit, whose state takes {_gb(then.state)}."
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
