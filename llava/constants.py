"""LLaVA's shared constants: the names and numbers that its checkpoints and data files rely on."""

IGNORE_INDEX = -100
"""Label of a token that carries no loss."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id inside ``input_ids``; replaced by image features before the language model runs."""

SHARED_SEGMENT, NO_SEGMENT = 0, -1
"""Of a row whose turns are kept apart: what all of them see, and padding; the turns count from 1."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."
