"""Whether a training step fits into a GPU without gradient checkpointing, which takes a third more time.

An estimate from shapes alone, in numbers (not bytes) that a token leaves in a decoder layer for the backward pass::

    8 hidden + 3 inner            norms, rotary embeddings, attention, activation; the layer's own weights frozen
    3 hidden + inner  more        where they train: the inputs of the projections
    2.5 vocabulary                once a token: logits in 16 bits and twice in 32, for the loss
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from llava.devices import free_memory
from llava.model.partitioned import size_of
from llava.utils import rank0_print

MARGIN, RESERVE = 0.9, 2 * 2**30
"""Of what is free this share is counted on, less what libraries take for themselves."""
OPTIMIZER_BYTES = 16
"""A trained weight's gradient, float32 copy and two moments."""


def activation_bytes(config: Any, tokens: int, width: int, whole: bool) -> int:
    """Kept by a step over ``tokens`` positions for its backward pass.

    Args:
        config: of the decoder. width: bytes of a number. whole: its own weights train.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 8 * hidden + 3 * inner + (3 * hidden + inner if whole else 0)
    return int(tokens * (config.num_hidden_layers * layer * width + config.vocab_size * 10))


def settle_checkpointing(model: nn.Module, longest: int, args: Any, stage: int) -> None:
    """Say whether gradients are checkpointed, and set ``args.gradient_checkpointing``.

    Args:
        longest: positions of the longest sample. args: of the run. stage: of ZeRO, 0 without; from 3 on the weights are
            spread over the processes.
    """
    free = free_memory()
    if free is None:
        args.gradient_checkpointing = False
        return
    parameters = list(model.parameters())
    trained = sum(size_of(parameter) for parameter in parameters if parameter.requires_grad)
    width = 2 if args.bf16 or args.fp16 else 4
    shares = args.world_size if stage >= 3 else 1
    weights = sum(size_of(parameter) * parameter.element_size() for parameter in parameters) // shares
    optimizer = trained * OPTIMIZER_BYTES // (args.world_size if stage else 1)
    decoder: Any = model
    whole = any(parameter.requires_grad for parameter in decoder.get_model().layers.parameters())
    tokens = longest * args.per_device_train_batch_size
    step = activation_bytes(decoder.config, tokens, width, whole)
    needed = weights + optimizer + step + RESERVE - already_there(parameters)
    args.gradient_checkpointing = needed > MARGIN * free
    fits = "does not fit" if args.gradient_checkpointing else "fits"
    rank0_print(
        f"gradient checkpointing: {'on' if args.gradient_checkpointing else 'off'}; a step over "
        f"{args.per_device_train_batch_size} x {longest} positions {fits} into {_gigabytes(free)} that are free "
        f"(about {_gigabytes(step)} of activations, {_gigabytes(weights)} of weights); "
        "--gradient_checkpointing True or False decides instead"
    )


def already_there(parameters: Iterable[Tensor]) -> int:
    """Bytes of parameters that lie on an accelerator."""
    return sum(parameter.nbytes for parameter in parameters if parameter.device.type != "cpu")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
