"""Visual instruction tuning, LLaVA's second stage: all weights but the tower's, or what the flags leave free.

The stage's folder holds the whole model, tower included. With ``--lora_enable`` it holds the LoRA in PEFT's format and
``non_lora_trainables.bin``, the projector and whatever else trained in full, over the language model as its base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava.checkpoints.kinds import NON_LORA_FILE
from llava.continual.methods import METHODS, Context, Recipe
from llava.data.rows import Row
from llava.model.adapters import PEFT_PREFIX
from llava.train.parts import check_parts, groups_of, trained_parameters
from llava.train.states import get_peft_state_non_lora_maybe_zero_3, save_tensors
from llava.utils import UserError


@METHODS.register
class Instruct(Recipe):
    name = "instruct"
    needs_keys = False

    def rows(self, context: Context, rows: list[Row]) -> list[Row]:
        if context.model_args.tune_mm_mlp_adapter:
            raise UserError(
                "--tune_mm_mlp_adapter True is feature alignment; leave out --method, or give --method align"
            )
        check_parts(context.model_args, context.args)
        return rows

    def writes_whole(self, context: Context) -> bool:
        return not context.args.lora_enable

    def begin(self, context: Context) -> Sequence[nn.Parameter | Mapping[str, Any]]:
        trained = trained_parameters(context.model, context.model_args, context.args, context.new_tokens)
        return groups_of(trained, context.args)

    def end(self, context: Context, batches: Iterable[dict[str, Any]]) -> None:
        if context.args.lora_enable:
            state = get_peft_state_non_lora_maybe_zero_3(context.model.named_parameters())
            plain = {PEFT_PREFIX + name.replace(".base_layer.", "."): value for name, value in state.items()}
            context.more_files.append(partial(_save, state=plain))


def _save(folder: Path, state: dict[str, Tensor]) -> None:
    save_tensors(folder / NON_LORA_FILE, state)
