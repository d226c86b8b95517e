"""A LLaVA checkpoint of a few thousand random weights, in the real layout, and stage checkpoints over it."""

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, PreTrainedTokenizerFast

from llava.checkpoints.weights import fingerprint
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.slots.encoders import BaseEmbeddingEncoder
from llava.slots.pool import Pool
from llava.slots.queries import TaskStatistics
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots

HIDDEN, LAYERS, PIXELS, VISION = 32, 2, 16, 16
GROUPS, SLOTS, RANK = 4, 4, 2
FAMILIES = {
    "llama": (LlavaConfig, LlavaLlamaForCausalLM),
    "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
}
WORDS = "yes no left right lung is there a lesion in the image of chest abdomen head what side where USER ASSISTANT:"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few words; ``</s>`` ends an answer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_base(folder, seed=0, family="llama", hidden=HIDDEN):
    """Write a base checkpoint with its own vision tower; returns its folder."""
    config_class, model_class = FAMILIES[family]
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=8,
    )
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2 if family == "llama" else 1,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.5,
        mm_vision_tower="",
        mm_hidden_size=VISION,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_aspect_ratio="pad",
        conversation_version="vicuna_v1",
        vision_config=vision.to_dict(),
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return folder


def write_stage(folder, base, tasks=("abd", "chest"), seed=1):
    """Write a light stage checkpoint with random, trained slots for ``tasks``; returns its folder."""
    encoder = BaseEmbeddingEncoder(base)
    settings = RetrieverSettings(
        num_layers=LAYERS,
        features={"o_proj": (HIDDEN, HIDDEN)},
        text_dim=HIDDEN,
        image_dim=VISION,
        groups=GROUPS,
        rank=RANK,
        top_k=2,
        encoder=encoder.identity,
    )
    generator = torch.Generator().manual_seed(seed)
    slots = [_task_slots(name, number * SLOTS, generator) for number, name in enumerate(tasks)]
    folder.mkdir(parents=True, exist_ok=True)
    base_identity = {"path": str(base), "fingerprint": fingerprint(base)}
    Pool(settings, slots, base_identity).write(folder / "slots.pth")
    return folder


def _task_slots(name, start, generator):
    def random(*shape):
        return torch.randn(*shape, generator=generator)

    queries = torch.cat([random(40, HIDDEN), random(40, VISION)], dim=1)
    return TaskSlots(
        name,
        start,
        start + SLOTS,
        text_keys=random(GROUPS, SLOTS, HIDDEN // GROUPS),
        image_keys=random(GROUPS, SLOTS, VISION // GROUPS),
        statistics=TaskStatistics.of(queries),
        trained=True,
        A={"o_proj": random(SLOTS, LAYERS, RANK, HIDDEN)},
        B={"o_proj": random(SLOTS, LAYERS, RANK, HIDDEN)},
    )


def write_images(folder, names):
    """Small pictures, all different, one of them wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        size = (24, 16) if number % 3 else (16, 20)
        Image.new("RGB", size, ((number * 53) % 256, (number * 97) % 256, (number * 29) % 256)).save(folder / name)
    return folder
