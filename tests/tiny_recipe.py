"""The smallest tiny base that goes through every step of its making."""

from llava.toy.tiny_base import TinyBaseConfig

SMALL = TinyBaseConfig(
    image_size=32,
    tower_width=16,
    tower_layers=1,
    tower_heads=2,
    tower_steps=4,
    tower_batch=4,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=2,
    vocab_size=400,
    pictures=24,
    steps=4,
    batch=2,
    questions=3,
)
