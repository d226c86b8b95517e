"""Feature alignment, LLaVA's first stage: the projector learns to say in the decoder's words what the tower sees.

The stage's folder holds ``mm_projector.bin`` and ``config.json``: a projector for the language model, which the loader
takes with ``--model-base`` and instruction tuning with ``--pretrain_mm_mlp_adapter``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava.checkpoints.kinds import PROJECTOR_FILE
from llava.continual.methods import METHODS, Context, Recipe
from llava.data.rows import Row
from llava.train.parts import check_parts, groups_of, trained_parameters, wanted_parts
from llava.train.states import projector_state, save_tensors
from llava.utils import UserError


@METHODS.register
class Align(Recipe):
    name = "align"
    needs_keys = False

    def rows(self, context: Context, rows: list[Row]) -> list[Row]:
        if not context.model_args.mm_tunable_parts:
            context.model_args.tune_mm_mlp_adapter = True  # asked for by name: --method align
        check_parts(context.model_args, context.args)
        if wanted_parts(context.model_args, context.args) != {"projector"} or context.args.lora_enable:
            raise UserError(
                "feature alignment trains the projector alone; leave out the flag that freezes it or trains more, or "
                "leave out --tune_mm_mlp_adapter"
            )
        blind = next((row for row in rows if not row.images), None)
        if blind is not None:
            raise UserError(f"row {blind.id!r} has no picture, and feature alignment learns from pictures; drop it")
        return rows

    def begin(self, context: Context) -> Sequence[nn.Parameter | Mapping[str, Any]]:
        trained = trained_parameters(context.model, context.model_args, context.args, context.new_tokens)
        return groups_of(trained, context.args)

    def end(self, context: Context, batches: Iterable[dict[str, Any]]) -> None:
        state = projector_state(context.model, bool(context.model.config.mm_use_im_start_end))
        context.more_files.append(partial(_save, state=state))


def _save(folder: Path, state: dict[str, Tensor]) -> None:
    save_tensors(folder / PROJECTOR_FILE, state)
