"""A tiny LLaVA trained from scratch on generic phantoms: tower first, then projector and decoder on the frozen tower.

- one picture carries many questions: they share the picture's tokens and cannot see each other (a block mask), so a
  question is trained exactly as it is asked later, alone;
- every batch follows from the seed and the step number, so a killed training goes on from its last checkpoint and ends
  in the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, GenerationConfig, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.labels import conversation_ids
from llava.files import atomic_write
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.progress import Progress
from llava.toy.phantom_talk import DIALECTS, GLOSSARY, Dialect, make_dialects, talk
from llava.toy.tiny_tower import GenericPictures, TowerTrainer, normalised, tower_batch

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
PIXEL_MEAN, PIXEL_STD = 0.45, 0.27


@dataclass(frozen=True)
class TinyBaseConfig:
    """Sizes and lengths of the tiny base and of its training."""

    seed: int = 0
    image_size: int = 64
    patch_size: int = 8
    tower_width: int = 128
    tower_layers: int = 3
    tower_heads: int = 4
    tower_steps: int = 450
    tower_batch: int = 48
    tower_lr: float = 2.5e-3
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    vocab_size: int = 800
    pictures: int = 8000
    steps: int = 180
    batch: int = 16
    questions: int = 12
    lr: float = 2e-3
    conversation_version: str = "mistral_instruct"

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


def train_tokenizer(config: TinyBaseConfig, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``texts``; LLaVA-compatible special tokens, every byte can be said."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_texts(pictures: GenericPictures, dialects: list[Dialect], seed: int) -> list[str]:
    """What the tokenizer learns from: generic talk in the template's brackets, and the glossary."""
    rng = np.random.default_rng([seed, 3])
    texts = [f" {word} </s>" for word in GLOSSARY for _ in range(20)]
    for scene in pictures.scenes[:1500]:
        texts += [f"\n{question} [/INST] {answer} </s>" for question, answer in talk(scene, dialects, 8, rng)]
    return texts


def model_config(config: TinyBaseConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The LLaVA config of the tiny base; its tower ships with the checkpoint."""
    vision = CLIPVisionConfig(
        hidden_size=config.tower_width,
        intermediate_size=3 * config.tower_width,
        num_hidden_layers=config.tower_layers,
        num_attention_heads=config.tower_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.tower_width,
    )
    return LlavaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vision_config=vision.to_dict(),
        mm_hidden_size=config.tower_width,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-1,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio="pad",
        tokenizer_padding_side="right",
        conversation_version=config.conversation_version,
    )


@dataclass
class Packed:
    """A batch of pictures with several questions each, as one row of tokens a picture.

    ``ids`` ``[batch, length]`` holds the tokens behind the shared picture; ``segments`` the question each belongs to
    (-1: padding); ``positions`` where it would stand if its question were alone; ``labels`` as in training.
    """

    ids: Tensor
    segments: Tensor
    positions: Tensor
    labels: Tensor


@dataclass
class Encoder:
    """Token ids of questions and answers, split where the picture goes; asks the tokenizer once for each pair."""

    tokenizer: PreTrainedTokenizerFast
    conv_mode: str
    known: dict[tuple[str, str], tuple[list[int], list[int]]] = field(default_factory=dict)
    prefix: list[int] = field(default_factory=list)

    def __call__(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels of what follows the picture."""
        if (question, answer) not in self.known:
            turns = [("human", question), ("gpt", answer)]
            ids, labels = conversation_ids(turns, self.tokenizer, self.conv_mode, images=1)
            place = ids.index(IMAGE_TOKEN_INDEX)
            self.prefix = ids[:place]
            self.known[question, answer] = (ids[place + 1 :], labels[place + 1 :])
        return self.known[question, answer]


def pack(talks: list[list[tuple[str, str]]], encode: Encoder, picture_tokens: int, pad_id: int) -> Packed:
    """Put the questions of each picture behind one another."""
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for pairs in talks:
        ids: list[int] = []
        segments: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        for index, (question, answer) in enumerate(pairs):
            own, own_labels = encode(question, answer)
            first = len(encode.prefix) + picture_tokens
            ids += own
            labels += own_labels
            segments += [index] * len(own)
            positions += range(first, first + len(own))
        rows.append((ids, segments, positions, labels))
    length = max(len(row[0]) for row in rows)
    columns = []
    for column, filler in enumerate((pad_id, -1, 0, IGNORE_INDEX)):
        columns.append(torch.tensor([row[column] + [filler] * (length - len(row[column])) for row in rows]))
    return Packed(*columns)


def packed_loss(model: LlavaLlamaForCausalLM, features: Tensor, packed: Packed, prefix: list[int]) -> Tensor:
    """Mean cross-entropy on the answers of a packed batch.

    Args:
        features: tower features ``[batch, patches, mm_hidden_size]``.
    """
    core = model.get_model()
    batch, device = len(features), features.device
    pictures = core.mm_projector(features)  # [batch, patches, hidden]
    first = core.embed_tokens(torch.tensor(prefix, device=device)).expand(batch, -1, -1)
    embeds = torch.cat([first, pictures, core.embed_tokens(packed.ids)], dim=1)  # [batch, shared + length, hidden]
    shared = embeds.shape[1] - packed.ids.shape[1]
    positions = torch.cat([torch.arange(shared, device=device).expand(batch, -1), packed.positions], dim=1)
    hidden = core(
        inputs_embeds=embeds,
        attention_mask=_block_mask(packed.segments, shared),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, shared:]
    # A label is predicted by the token before it, which belongs to the same question: no answer begins one.
    wanted = packed.labels[:, 1:] != IGNORE_INDEX
    logits = model.lm_head(hidden[:, :-1][wanted])
    return F.cross_entropy(logits, packed.labels[:, 1:][wanted])


def _block_mask(segments: Tensor, shared: int) -> Tensor:
    """Additive mask ``[batch, 1, length, length]``: causal, and a question sees the shared tokens and itself only."""
    batch, length = segments.shape
    owner = torch.cat([segments.new_full((batch, shared), -2), segments], dim=1)
    seen = (owner[:, :, None] == owner[:, None, :]) | (owner == -2)[:, None, :]
    causal = torch.ones(shared + length, shared + length, dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill(~(seen & causal), torch.finfo(torch.float32).min)[:, None]


@torch.no_grad()
def all_features(trainer: TowerTrainer, pixels: Tensor, batch: int = 128) -> Tensor:
    """Tower features ``[n, patches, width]`` of all pictures."""
    pieces = [
        trainer.tower(pixel_values=normalised(part, PIXEL_MEAN, PIXEL_STD)).last_hidden_state[:, 1:]
        for part in pixels.split(batch)
    ]
    return torch.cat(pieces)


Loss = Callable[[int], Tensor]


def run_steps(
    name: str, module: torch.nn.Module, loss_of: Loss, steps: int, lr: float, folder: Path, every: int
) -> None:
    """Train ``module`` for ``steps``; goes on from ``folder/<name>.pt`` and leaves the finished state there.

    Args:
        loss_of: the loss of one step, from its number alone.
        lr: highest learning rate; rises over the first tenth and falls along a half cosine.
        every: steps between two checkpoints.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    path, start = folder / f"{name}.pt", 0
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        start = saved["step"]
        if start < steps:
            optimizer.load_state_dict(saved["optimizer"])
    progress = Progress(name, "step", range(start, steps), total=steps, done=start, stays=True)
    module.train()
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.figures["loss"] = loss.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            _save_state(path, {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    module.eval()


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def _save_state(path: Path, state: dict[str, Any]) -> None:
    with atomic_write(path, "wb") as stream:
        torch.save(state, stream)


def tower_loss(trainer: TowerTrainer, pictures: GenericPictures, config: TinyBaseConfig) -> Loss:
    """The loss of a step of the tower's pre-training."""

    def loss_of(step: int) -> Tensor:
        pixels, patches, labels = tower_batch(pictures, config.tower_batch, step, config.seed)
        return trainer.loss(normalised(pixels, PIXEL_MEAN, PIXEL_STD), patches, labels)

    return loss_of


def language_loss(
    model: LlavaLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pictures: GenericPictures,
    features: Tensor,
    config: TinyBaseConfig,
) -> Loss:
    """The loss of a step of the joint training of projector and decoder."""
    encode = Encoder(tokenizer, config.conversation_version)
    dialects = make_dialects(config.seed, DIALECTS)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 4, step])
        chosen = rng.integers(0, len(pictures), config.batch)
        talks = [talk(pictures.scenes[index], dialects, config.questions, rng) for index in chosen]
        packed = pack(talks, encode, features.shape[1], tokenizer.pad_token_id)
        return packed_loss(model, features[torch.from_numpy(chosen)], packed, encode.prefix)

    return loss_of


def build_model(
    config: TinyBaseConfig, tokenizer: PreTrainedTokenizerFast, trainer: TowerTrainer
) -> LlavaLlamaForCausalLM:
    """An untrained model around the trained, frozen tower."""
    torch.manual_seed(config.seed + 1)
    model = LlavaLlamaForCausalLM(model_config(config, tokenizer))
    tower = model.get_vision_tower().vision_tower
    tower.load_state_dict(trainer.tower.state_dict())
    return model


def save_base(
    folder: Path, model: LlavaLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: TinyBaseConfig
) -> None:
    """Write the checkpoint in the LLaVA layout; the recipe's settings go into ``config.json``."""
    model.config.tiny_base = asdict(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = config.image_size
    CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    ).save_pretrained(folder)
