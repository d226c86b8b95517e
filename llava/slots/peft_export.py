"""A task's slots as one LoRA adapter for the PEFT library.

A route adds ``scale * sum_p w[p] A[p]^T B[p]`` to a projection. For fixed weights that is a LoRA of rank ``k r``::

    lora_A = [B[p] for p]  [k r, in],    lora_B = [scale * w[p] * A[p] for p]^T  [out, k r],    scaling 1

so an answer with the adapter equals an answer whose every question is routed to that mixture.

Two layouts, for the two classes that a base can be loaded by: ``llava`` fits this package's (and LLaVA's own), ``hf``
fits ``LlavaForConditionalGeneration``. The latter is written as serving engines read adapters: a plain list of last
names in ``target_modules`` (SGLang takes each name's last part and knows no patterns), one rank for all layers, no
``modules_to_save`` (vLLM refuses it), and tensor names as the checkpoint has them in transformers (vLLM maps those).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from llava.checkpoints.hf_layout import HF_ARCHITECTURES
from llava.checkpoints.weights import read_config
from llava.files import atomic_write
from llava.slots.merge import refuse_more_than_slots
from llava.slots.names import ALL
from llava.slots.offsets import ATTENTION_TARGETS
from llava.slots.pool import Pool
from llava.slots.task_slots import TaskSlots
from llava.utils import UserError, rank0_print

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DECODERS = {"llava": "model.layers", "hf": "model.language_model.layers"}
"""Layouts, and where the decoder's layers are in the class that each fits."""
NOT_DECODER = r".*(vision_tower|multi_modal_projector).*"
"""A list of last names would fit projections of the vision tower too."""


def fixed_mixture(pool: Pool, task: TaskSlots, weights: list[float] | None = None) -> dict[int, float]:
    """Weight per slot of the task (counted from 0); slots without weight are left out.

    Without ``weights``: the mean weights of the task's own questions as stage 1 recorded them (equal ones where it did
    not), restricted to the ``top_k`` heaviest slots and scaled to sum to 1.

    Raises:
        UserError: another number of weights than slots, one that is no finite number, or none that differs from 0.
    """
    if weights is not None:
        if len(weights) != task.count:
            raise UserError(f"{len(weights)} weights given, but task {task.name!r} has {task.count} slots")
        if not all(map(math.isfinite, weights)):
            raise UserError(f"weights {', '.join(map(str, weights))}: give finite numbers")
        chosen = {slot: weight for slot, weight in enumerate(weights) if weight}
        if not chosen:
            raise UserError("all weights are 0: there is nothing to export")
        return chosen
    mean = task.info.get("mixture") or [1 / task.count] * task.count
    heaviest = sorted(range(task.count), key=lambda slot: (-mean[slot], slot))[: pool.settings.top_k]
    total = sum(mean[slot] for slot in heaviest)
    return {slot: mean[slot] / total for slot in sorted(heaviest)}


def adapter_tensors(pool: Pool, task: TaskSlots, mixture: dict[int, float], layout: str = "llava") -> dict[str, Tensor]:
    """The adapter's weights under the names that PEFT expects, float32."""
    chosen = list(mixture)
    weight = torch.tensor([mixture[slot] * pool.settings.scale for slot in chosen])[:, None, None]
    tensors = {}
    for target in pool.settings.targets:
        for layer in range(pool.settings.num_layers):
            name = f"base_model.model.{DECODERS[layout]}.{layer}.{_part(target)}"
            down = task.B[target][chosen, layer].float()  # [k, rank, in]
            up = task.A[target][chosen, layer].float() * weight  # [k, rank, out]
            tensors[f"{name}.lora_A.weight"] = down.flatten(0, 1).contiguous()  # [k rank, in]
            tensors[f"{name}.lora_B.weight"] = up.flatten(0, 1).T.contiguous()  # [out, k rank]
    return tensors


def export_peft(
    pool: Pool,
    task_name: str,
    folder: str | Path,
    weights: list[float] | None = None,
    layout: str = "llava",
    base: str | None = None,
) -> dict[int, float]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; returns the mixture that was folded in.

    Args:
        layout: a key of ``DECODERS``. base: what the adapter names as its base (default: the slots' own).

    Raises:
        UserError: an unknown or untrained task, unusable weights, or an unknown layout.
    """
    from peft import LoraConfig

    refuse_more_than_slots("the stage", pool, "exported")
    if pool.settings.offset_scope != ALL:
        raise UserError(
            "the stage's offsets act behind the picture alone, which no LoRA does; train it with --offset_scope all"
        )
    if layout not in DECODERS:
        raise UserError(f"unknown layout {layout!r}; choose {' or '.join(DECODERS)}")
    task = pool.task(task_name)
    if not task.trained:
        raise UserError(f"task {task_name!r} is not trained yet, so its adapter would change nothing; train it first")
    mixture = fixed_mixture(pool, task, weights)
    folder = Path(folder)
    rank = len(mixture) * pool.settings.rank
    targets = pool.settings.targets
    named = base or pool.base.get("path")
    config: Any = LoraConfig(
        task_type="CAUSAL_LM" if layout == "llava" else None,
        auto_mapping=None if layout == "llava" else _hf_class(named, pool),
        base_model_name_or_path=named,
        r=rank,
        lora_alpha=rank,  # scaling 1: scale and weights are folded into lora_B
        target_modules=_pattern(targets) if layout == "llava" else list(targets),
        exclude_modules=None if layout == "llava" else NOT_DECODER,
        inference_mode=True,
    )
    with atomic_write(folder / WEIGHTS, "wb") as stream:
        stream.write(safetensors_bytes(adapter_tensors(pool, task, mixture, layout), metadata={"format": "pt"}))
    with atomic_write(folder / CONFIG) as stream:  # as PEFT writes it, but for sets, whose order there is chance
        json.dump(config.to_dict(), stream, indent=2, sort_keys=True, default=sorted)
    return mixture


def _hf_class(base: str | None, pool: Pool) -> dict[str, str]:
    """Where PEFT finds the class of a base in Hugging Face's layout: no auto class for causal models knows it."""
    config = read_config(Path(base)) if base and (Path(base) / "config.json").is_file() else {}
    tiles = pool.prompt.get("aspect_ratio") == "anyres"
    name = next((name for name in config.get("architectures") or [] if name in HF_ARCHITECTURES), "")
    if config and not name:
        rank0_print(
            f"note: {base} is not in Hugging Face's layout, so PEFT does not find the base by itself; convert it "
            "(scripts/convert_llava_weights.py --direction to_hf) and give it as --model-base"
        )
    name = name or HF_ARCHITECTURES[tiles]
    module = "llava_next" if "Next" in name else "llava"
    return {"base_model_class": name, "parent_library": f"transformers.models.{module}.modeling_{module}"}


def _part(target: str) -> str:
    part = "self_attn" if target in ATTENTION_TARGETS else "mlp"
    return f"{part}.{target}"


def _pattern(targets: tuple[str, ...]) -> str:
    """A pattern for the decoder's projections alone: a vision tower calls some of its own the same."""
    return "|".join(rf"{re.escape(DECODERS['llava'])}\.\d+\.{re.escape(_part(target))}" for target in targets)
