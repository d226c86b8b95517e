"""What slots cost a LLaVA-1.5-7B, counted operator by operator on the meta device: no weights, no GPU, no clock.

    python benchmarks/costs.py

A training step, a prefill and a decoding step from embeddings with a prepared mask, each without slots and with those
of 3 and of 1,000 tasks (8 slots a task, 4 of them a question, rank 8, attention outputs) that the questions of a batch
take in turn. Attention is ``_scaled_dot_product_efficient_attention``, which SDPA takes on a GPU where there is a mask.
A question's offsets are there before a decoding step, as they are in ``generate``. Layers are alike, so two and four of
them are counted, and what a pair adds is added for the others. Of each operator that starts a kernel (views do not)::

    FLOPs      of matrix products, by torch.utils.flop_counter
    bytes      of all tensors that it reads and writes, as an eager program moves them
    largest    the largest tensor that it makes

and then what the slots of a batch of 16 questions take: bytes a question, as the projections read them, and how many
are written to bring those together. The figures depend on shapes alone: they are the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.cli import flag, parse  # noqa: E402
from llava.model.decision import Decision  # noqa: E402
from llava.model.grown_cache import grown_cache  # noqa: E402
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # noqa: E402
from llava.model.language_model.retriever import Retriever  # noqa: E402
from llava.slots.offsets import TARGETS, target_features  # noqa: E402
from llava.slots.pool import Pool  # noqa: E402
from llava.slots.route import Route  # noqa: E402
from llava.slots.settings import RetrieverSettings  # noqa: E402
from llava.slots.task_slots import TaskSlots  # noqa: E402
from llava.utils import run_cli  # noqa: E402

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
LAYERS, COUNTED = 32, (2, 4)
VOCABULARY, POSITIONS, ANSWER = 32000, 576 + 60, 8
SLOTS, TOP_K = 8, 4
STEPS = {"training step": 4, "prefill": 16, "decoding step": 16}
"""What is counted, and over how many questions."""
ATTENTION = "efficient_attention"
TAKING = {"index_select", "index", "gather", "embedding"}
NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"}


@dataclass
class Cost:
    """Sums over the operators that start a kernel; ``bytes`` read and ``written``, and the ``largest`` tensor's."""

    flops: int = 0
    bytes: int = 0
    written: int = 0
    operators: int = 0
    largest: int = 0

    def over(self, base: Cost) -> tuple[float, float, float]:
        """FLOPs and bytes as multiples of the base's, and the operators that it does not have, a layer."""
        more = (self.operators - base.operators) / LAYERS
        return self.flops / base.flops, self.bytes / base.bytes, more

    def deeper(self, layers: int, other: Cost, others: int, depth: int = LAYERS) -> Cost:
        """Of a model of ``depth`` layers, where one of ``layers`` costs this and one of ``others`` the ``other``."""
        sums = ("flops", "bytes", "written", "operators")
        found = {name: (getattr(self, name), getattr(other, name)) for name in sums}
        grown = {name: one + (two - one) * (depth - layers) // (others - layers) for name, (one, two) in found.items()}
        return Cost(largest=max(self.largest, other.largest), **grown)


class Counting(TorchDispatchMode):
    """Adds what runs meanwhile to ``cost``."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _is_view(func):
            return out
        read, made, name = _tensors((args, kwargs)), _tensors(out), func.overloadpacket.__name__
        if name in TAKING:
            read = [*read[1:], *made]  # of the table what is taken
        self.cost.operators += 1
        self.cost.bytes += sum(map(_moved, [*read, *made]))
        self.cost.written += sum(map(_moved, made))
        if not name.endswith("_"):  # those write into what was there
            self.cost.largest = max([self.cost.largest, *(tensor.nbytes for tensor in made)])
        twin = getattr(torch.ops.aten, name.rstrip("_"), None)  # one that writes in place is registered nowhere
        if (flops := flop_registry.get(twin)) is not None:
            self.cost.flops += flops(*args, **kwargs, out_val=out)
        return out


def _is_view(func: Any) -> bool:
    """Whether an operator only looks at a tensor in another way, or makes one without writing it."""
    returned = [value.alias_info for value in func._schema.returns]
    aliases = any(found is not None and not found.is_write for found in returned)
    return aliases or func.overloadpacket.__name__ in NO_KERNEL


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _moved(tensor: Tensor) -> int:
    """Bytes of a tensor; what is expanded is read once."""
    real = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
    return torch.Size(real).numel() * tensor.element_size() if tensor.numel() else 0


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """SDPA's kernel for a batch with a mask on a GPU; ``query`` and the others ``[batch, heads, length, part]``."""
    grown = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    out = attend(query, key, value, grown, compute_log_sumexp=torch.is_grad_enabled(), scale=scaling)[0]
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def model_without_weights(layers: int, tasks: int = 0, targets: Iterable[str] = ("o_proj",)) -> LlavaLlamaForCausalLM:
    """LLaVA-1.5-7B's decoder, with so many layers, and head in bfloat16 on the meta device, with the slots of so many
    trained tasks."""
    config = LlavaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, attn_implementation=ATTENTION, dtype=torch.bfloat16, **SHAPE
    )
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    if tasks:
        model.attach_adapter(Retriever(pool_without_weights(config, tasks, targets)))
    return model


def pool_without_weights(config: Any, tasks: int, targets: Iterable[str] = ("o_proj",)) -> Pool:
    """Slots of so many tasks, on the meta device."""
    features = {target: target_features(config, target) for target in targets}
    settings = RetrieverSettings(config.num_hidden_layers, features, text_dim=8, query_mode="text", top_k=TOP_K)
    with torch.device("meta"):
        made = [TaskSlots.empty(settings, f"t{number:04d}", SLOTS * number, SLOTS) for number in range(tasks)]
    for task in made:
        task.trained = True
    return Pool(settings, made).to("meta")


def route(rows: int, tasks: int) -> Route:
    """Four neighbouring slots of a task for each row; the rows take the tasks in turn."""
    chosen = [[SLOTS * (row % tasks) + (row + number) % SLOTS for number in range(TOP_K)] for row in range(rows)]
    return Route(torch.tensor(chosen), torch.full((rows, TOP_K), 1 / TOP_K))


def count(step: str, tasks: int) -> Cost:
    """What one of ``STEPS`` costs with the slots of so many ``tasks``, of which a training step trains the first."""
    few, more = COUNTED
    return count_with(few, step, tasks).deeper(few, count_with(more, step, tasks), more)


def count_with(layers: int, step: str, tasks: int) -> Cost:
    """The same of a model of so many layers."""
    rows, model = STEPS[step], model_without_weights(layers, tasks)
    trains, decodes = step == "training step", step == "decoding step"
    inputs: dict[str, Any] = {}
    if tasks:
        if trains:
            model.retriever.train_only("t0000")
        decision = Decision(route(rows, 1 if trains else tasks), model.retriever)
        if not trains:  # other questions asked for these tasks before
            with torch.no_grad():
                (decision if decodes else Decision(decision.route, decision.adapter)).action(rows, torch.bfloat16)
        inputs["route"] = decision
    new, before = (1, POSITIONS) if decodes else (POSITIONS, 0)
    embeds, mask = _empty(rows, new, SHAPE["hidden_size"]), _empty(rows, 1, new, before + new)
    inputs |= {"inputs_embeds": embeds.requires_grad_(trains), "attention_mask": mask}
    if trains:
        labels = torch.full((rows, POSITIONS), -100)
        labels[:, -ANSWER:] = 1
        with Counting() as counting:
            model(labels=labels, answers_only=True, use_cache=False, **inputs).loss.backward()
        return counting.cost
    inputs["past_key_values"] = cache_without_numbers(model.config, rows, before)
    with Counting() as counting, torch.no_grad():
        model(use_cache=True, logits_to_keep=1, **inputs)
    return counting.cost


@torch.no_grad()
def cache_without_numbers(config: Any, rows: int, length: int) -> DynamicCache:
    """Keys and values of so many positions, with room for more, as ``generate`` has them; or an empty cache."""
    cache, heads = grown_cache(config), SHAPE["num_attention_heads"]
    for layer in range(config.num_hidden_layers if length else 0):
        kept = _empty(rows, heads, length, SHAPE["hidden_size"] // heads)
        cache.update(kept, kept.clone(), layer)
    return cache


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def slot_bytes(tasks: int, targets: Iterable[str], rows: int = 16) -> tuple[float, float]:
    """Bytes of slots a question of a batch, whose tasks were asked before, and what is written over what is read."""
    pool, taken = (
        pool_without_weights(LlavaConfig(num_hidden_layers=LAYERS, **SHAPE), tasks, targets),
        route(rows, tasks),
    )
    with torch.no_grad():
        pool(taken.slot_indices, taken.slot_weights, torch.bfloat16)
        with Counting() as counting:
            offset = pool(taken.slot_indices, taken.slot_weights, torch.bfloat16)
    read = sum(side.nbytes for sides in (offset.down, offset.up) for side in sides.values())
    return read / rows, counting.cost.written / read


@dataclass
class Arguments:
    """How many tasks there are."""

    tasks: list[int] = flag([3, 1000], "numbers of tasks whose slots are there")


def main() -> None:
    """Print both tables."""
    arguments = parse(Arguments, description=__doc__.splitlines()[0])
    print(f"{'step':<15}{'questions':>9}{'tasks':>7}{'TFLOP':>9}{'GB':>9}{'operators':>11}{'largest MB':>12}", end="")
    print(f"{'FLOPs':>9}{'bytes':>8}{'operators a layer':>19}")
    for step, rows in STEPS.items():
        base = count(step, 0)
        for tasks in (0, *arguments.tasks):
            cost = count(step, tasks) if tasks else base
            flops, moved, more = cost.over(base)
            sums = f"{cost.flops / 1e12:>9.2f}{cost.bytes / 1e9:>9.1f}{cost.operators:>11,}{cost.largest / 1e6:>12.1f}"
            print(f"{step:<15}{rows:>9}{tasks:>7}{sums}{flops:>9.4f}{moved:>8.4f}{more:>19.2f}")
    print(f"\n{'targets':<12}{'slots stored':>13}{'MB a question':>15}{'written over that':>19}")
    for name, targets in (("o_proj", ("o_proj",)), ("all seven", TARGETS)):
        for tasks in (1, 1000):
            read, written = slot_bytes(tasks, targets)
            print(f"{name:<12}{SLOTS * tasks:>13,}{read / 1e6:>15.1f}{written:>19.2f}")


if __name__ == "__main__":
    run_cli(main)
