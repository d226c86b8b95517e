"""``import llava`` alone, before or after transformers: the auto classes know the model types, star imports the names.

Each case runs in a process of its own, because what is imported once stays imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tiny_llava import write_base

FAMILIES = {"llama": "Llama", "mistral": "Mistral"}
ORDERS = {"llava first": "import llava, transformers", "transformers first": "import transformers, llava"}
LOADED = """
{imports}
import sys
assert "llava.model.llava_arch" not in sys.modules
config = transformers.AutoConfig.from_pretrained({folder!r})
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
print(type(config).__name__, type(model).__name__, type(model.get_vision_tower()).__name__)
"""
PIPELINE = """
import llava
from transformers import pipeline
pipe = pipeline("text-generation", model={folder!r}, max_new_tokens=3)
print(type(pipe.model).__name__, pipe("is there")[0]["generated_text"][:8])
"""


def run(program: str) -> str:
    """What a Python program prints, in a new process."""
    quiet = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    """``(family, folder)`` of a tiny base."""
    folder = tmp_path_factory.mktemp("auto") / "a-base"
    return request.param, str(write_base(folder, family=request.param))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_a_checkpoint_in_either_order(base, order):
    family, folder = base
    name = {"llama": "LlavaConfig", "mistral": "LlavaMistralConfig"}[family]
    shown = run(LOADED.format(imports=ORDERS[order], folder=folder))
    assert shown == f"{name} Llava{FAMILIES[family]}ForCausalLM CLIPVisionTower"


@pytest.mark.slow
def test_a_pipeline_loads_a_checkpoint(base):
    family, folder = base
    assert run(PIPELINE.format(folder=folder)) == f"Llava{FAMILIES[family]}ForCausalLM is there"


def test_import_llava_is_light_and_a_plain_config_keeps_it_so():
    """The classes of a model are imported when a LLaVA checkpoint is asked for, not before."""
    shown = run(
        "import llava, sys\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('llama').model_type, 'llava.model.llava_arch' in sys.modules)\n"
        "print(AutoConfig.for_model('llava').__module__.startswith('transformers.'))\n"
    )
    assert shown.split() == ["False", "False", "llama", "False", "True"]


def test_the_entries_are_the_classes_for_whoever_looks_at_the_table():
    """Also the ones that another program registered before."""
    shown = run(
        "from transformers import AutoConfig, LlamaConfig\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
        "AutoConfig.register('mine', Mine)\n"
        "import llava\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "from llava.model import LlavaConfig\n"
        "print(CONFIG_MAPPING['mine'] is Mine, CONFIG_MAPPING['llava_llama'] is LlavaConfig)\n"
        "print(list(CONFIG_MAPPING)[-3:] == ['llava_llama', 'llava_mistral', 'mine'])\n"
        "print(CONFIG_MAPPING.values()[-2].__name__)\n"
    )
    assert shown.split() == ["True", "True", "True", "LlavaMistralConfig"]


def test_star_imports_bring_llavas_classes():
    shown = run(
        "from llava import *\nfrom llava.model import *\n"
        "print(LlavaLlamaForCausalLM.__name__, LlavaConfig.model_type, LlavaMistralForCausalLM.__name__,\n"
        "      LlavaMistralConfig.model_type)\n"
        "from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM, LlavaLlamaModel\n"
        "from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM, LlavaMistralModel\n"
    )
    assert shown.split() == ["LlavaLlamaForCausalLM", "llava_llama", "LlavaMistralForCausalLM", "llava_mistral"]
