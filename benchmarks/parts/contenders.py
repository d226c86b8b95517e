"""A LLaVA of random weights, and the same weights with what is compared on them: our slots, and PEFT's LoRA.

Every contender is a model of its own that shares the base's tensors, so that all lie in memory at once and none carries
another's hooks. A LoRA has the rank of what it stands against: of a task's 8 slots in training, of the 4 slots of a
question in answering.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from benchmarks.costs import LAYERS, SHAPE, SLOTS, TOP_K, VOCABULARY, route
from llava.model.decision import Decision
from llava.model.grown_cache import grown_cache
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.retriever import Retriever
from llava.model.prefixes import PrefixStore
from llava.slots.names import ALL
from llava.slots.offsets import target_features
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots

TASK = "t0000"
PREFIXES = 1 << 30
"""Bytes that kept prefixes may take."""


@dataclass(frozen=True)
class Shape:
    """Of a model, and of what it is asked.

    Attributes:
        picture: positions of a picture. text: positions of words. train_rows, rows: samples of a training step, and
            questions of a batch. answer: tokens of an answer.
    """

    decoder: dict[str, int]
    tower: dict[str, int]
    rank: int = 8
    text: int = 60
    train_rows: int = 4
    rows: int = 16
    answer: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def picture(self) -> int:
        return (self.tower["image_size"] // self.tower["patch_size"]) ** 2

    @property
    def positions(self) -> int:
        return self.picture + self.text


SEVEN_BILLION = Shape(
    {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        **SHAPE,
    },
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
)
"""LLaVA-1.5-7B, and its CLIP-L/14 at 336 pixels."""

SMALL = Shape(
    {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
    },
    {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 224,
        "patch_size": 16,
    },
    dtype=torch.float32,
)
"""Of a decoder of 135M, for a CPU."""

TINY = Shape(
    {
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
    },
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    rank=2,
    text=20,
    train_rows=2,
    rows=4,
    answer=3,
    dtype=torch.float32,
)
"""Runs anywhere in seconds: its figures say nothing."""


def config_of(shape: Shape) -> LlavaConfig:
    """Of a LLaVA that has its tower's weights with it."""
    return LlavaConfig(
        **shape.decoder,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
        dtype=shape.dtype,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        vision_config=CLIPVisionConfig(**shape.tower).to_dict(),
        mm_hidden_size=shape.tower["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_aspect_ratio="pad",
        conversation_version="vicuna_v1",
    )


def random_model(shape: Shape, device: torch.device) -> Any:
    """A frozen LLaVA with random weights, made where it stays."""
    config = config_of(shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with device:
            model = LlavaLlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def sharing(model: Any) -> Any:
    """Another model over the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def with_slots(
    model: Any, shape: Shape, tasks: int, targets: Iterable[str] = ("o_proj",), offset_scope: str = ALL
) -> Any:
    """The model with random, trained slots of so many tasks, which route on the picture.

    All tasks have keys of their own and the same offsets: a thousand tasks of a 7B model would else take 67 GB. On the
    device each lies by itself, as slots of a stage do.
    """
    other, config = sharing(model), model.config
    features = {target: target_features(config, target) for target in targets}
    settings = RetrieverSettings(
        config.num_hidden_layers,
        features,
        image_dim=config.mm_hidden_size,
        query_mode="image",
        rank=shape.rank,
        top_k=TOP_K,
        router="keys",
        offset_scope=offset_scope,
    )
    generator = torch.Generator().manual_seed(0)
    first = TaskSlots.empty(settings, TASK, 0, SLOTS)
    first.init_offsets(settings, generator)
    for side in first.A.values():
        side.data.uniform_(-0.01, 0.01, generator=generator)
    made = []
    for number in range(tasks):
        keys = torch.randn(first.image_keys.shape, generator=generator)
        place = {"name": f"t{number:04d}", "start": SLOTS * number, "stop": SLOTS * (number + 1)}
        made.append(first.copy(**place, image_keys=keys, trained=True))
    other.attach_adapter(Retriever(Pool(settings, made)))
    return other


def with_lora(model: Any, rank: int, adapters: int = 1, targets: Iterable[str] = ("o_proj",)) -> Any:
    """The model in PEFT's hands, with so many random LoRAs of one rank, called ``a0``, ``a1``, …"""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=_of_decoder(targets), init_lora_weights=False
    )
    wrapped = get_peft_model(sharing(model), config, adapter_name="a0", autocast_adapter_dtype=False)
    for number in range(1, adapters):
        wrapped.add_adapter(f"a{number}", config)
    return wrapped.to(model.device)


def _of_decoder(targets: Iterable[str]) -> str:
    """A pattern of the decoder's projections: a tower has some of the same names."""
    return rf".*model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})"


# -- steps -------------------------------------------------------------------------------------------------------------


class Training:
    """A training step from embeddings: forward, backward, and the optimizer of what trains.

    Args:
        model: of ``with_slots``, whose first task trains, or of ``with_lora``, or a bare one, where the gradient goes
            down to the embeddings and nothing is updated.
    """

    def __init__(self, model: Any, shape: Shape):
        self.model, self.device = model.train(), next(model.parameters()).device
        self.decision: Decision | None = None
        adapter = getattr(model, "retriever", None)
        if adapter is not None:
            adapter.train_only(TASK)
            adapter.pool.changed()
            self.decision = Decision(route(shape.train_rows, 1), adapter)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=fused) if trained else None
        self.embeds = _embeds(shape, shape.train_rows, self.device).requires_grad_(True)
        self.labels = torch.full(self.embeds.shape[:2], -100, device=self.device)
        self.labels[:, -shape.answer :] = 5

    def __call__(self) -> None:
        given = {} if self.decision is None else {"route": self.decision}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.embeds.dtype == torch.bfloat16):
            out = self.model(inputs_embeds=self.embeds, labels=self.labels, answers_only=True, use_cache=False, **given)
        out.loss.backward()
        self.embeds.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class DenseTraining(Training):
    """The same step in the public prototype's form, written anew: the dense offset ``[out, in]`` of every layer is made
    of four of a task's slots and added to the weights, one mixture for the whole batch."""

    def __init__(self, model: Any, shape: Shape):
        other = sharing(model)
        layers, (wide, out) = other.get_model().layers, target_features(model.config, "o_proj")
        sides = torch.zeros(SLOTS, len(layers), shape.rank, out), torch.randn(SLOTS, len(layers), shape.rank, wide)
        other.dense = torch.nn.ParameterList([side.to(model.device) for side in sides])
        for number, layer in enumerate(layers):
            layer.self_attn.o_proj.forward = partial(self._project, number, layer.self_attn.o_proj.weight)
        super().__init__(other, shape)

    def __call__(self) -> None:
        dtype = self.embeds.dtype
        up, down = (side[:TOP_K].to(dtype) for side in self.model.dense)  # [slots, layers, rank, features]
        self.offsets = ((up.mT @ down) / TOP_K).sum(0)  # [layers, out, in]
        super().__call__()

    def _project(self, layer: int, weight: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight + self.offsets[layer])


class TrainingOnPictures(Training):
    """The same from ids and the tower's features, on rows that ask several questions about each picture.

    Args:
        batch: what the project's collator makes of the rows. keeps: a step finds the prefixes of the steps before
            (``llava.model.prefixes``), as in a training's second epoch; else it works out its own.
    """

    def __init__(self, model: Any, shape: Shape, batch: dict[str, Any], keeps: bool = False):
        super().__init__(model, replace(shape, train_rows=len(batch["input_ids"])))
        self.batch, self.keeps = batch, keeps
        self.model.prefixes = PrefixStore(PREFIXES)

    def __call__(self) -> None:
        if not self.keeps:
            self.model.prefixes = PrefixStore(PREFIXES)
        self.model(**self.batch, answers_only=True, route=self.decision).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Prefill:
    """The first pass over a batch of questions; each call begins with an empty cache."""

    def __init__(self, model: Any, shape: Shape, tasks: int = 0, adapters: int = 0):
        self.model, self.device = model.eval(), next(model.parameters()).device
        self.embeds = _embeds(shape, shape.rows, self.device)
        self.tasks, self.shape = tasks, shape
        self.names = [f"a{row % adapters}" for row in range(shape.rows)] if adapters else None

    def given(self) -> dict[str, Any]:
        """What says which slots or LoRAs a question goes to. Their offsets are brought together in each prefill."""
        if self.names is not None:
            return {"adapter_names": self.names}
        if self.tasks:
            return {"route": Decision(route(self.shape.rows, self.tasks), self.model.retriever)}
        return {}

    @torch.no_grad()
    def __call__(self) -> Any:
        return self.model(inputs_embeds=self.embeds, use_cache=True, logits_to_keep=1, **self.given())


class Decoding(Prefill):
    """A step of one token for a batch of questions, always at the same length."""

    def __init__(self, model: Any, shape: Shape, tasks: int = 0, adapters: int = 0):
        super().__init__(model, shape, tasks, adapters)
        self.route = self.given()
        with torch.no_grad():
            self.cache = grown_cache(self.model.config)
            given = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1, **self.route}
            self.model(inputs_embeds=self.embeds, **given)
        self.token = torch.full((shape.rows, 1), 5, device=self.device)
        self.embeds = self.embeds[:, :0]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        given = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1, **self.route}
        logits: Tensor = self.model(input_ids=self.token, **given).logits
        self.cache.crop(-1)
        return logits.argmax(-1)


class OneByOne:
    """A step of one question, taken once for each of so many."""

    def __init__(self, step: Prefill, rows: int):
        self.step, self.rows = step, rows

    def __call__(self) -> None:
        for _ in range(self.rows):
            self.step()


def _embeds(shape: Shape, rows: int, device: torch.device) -> Tensor:
    return 0.02 * torch.randn(rows, shape.positions, shape.decoder["hidden_size"], device=device, dtype=shape.dtype)


def trained_rank(shape: Shape) -> int:
    """Of a LoRA with as many weights as the slots of a task."""
    return SLOTS * shape.rank


def routed_rank(shape: Shape) -> int:
    """Of a LoRA that does what a question's slots do."""
    return TOP_K * shape.rank
