"""Entry point of stage 2: ``python -m llava.train.train_mem`` or ``deepspeed llava/train/train_mem.py``."""

from llava.train.train import main
from llava.utils import run_cli

if __name__ == "__main__":
    run_cli(main)
