"""Entry point of stage 2: ``python -m llava.train.train_mem`` or ``deepspeed llava/train/train_mem.py``."""

from llava.utils import quiet_libraries, run_cli


def main() -> None:
    quiet_libraries()
    from llava.train.train import main as train  # after the libraries it imports were told to be quiet

    train()


if __name__ == "__main__":
    run_cli(main)
