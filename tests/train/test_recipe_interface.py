"""What a recipe may say that no method that ships does: learning rates of its own, and weights of the model itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_world import arguments, refusal, same

from llava.checkpoints.weights import load_bin
from llava.continual.methods import METHODS
from llava.model.builder import load_base
from llava.registry import PLUGINS
from llava.slots.pool import Pool
from llava.train import llava_trainer
from llava.train.train import train
from llava.utils import UserError

SIDES = '''
"""Sequential, with a learning rate for each side of the offsets."""
from llava.continual.methods import METHODS
from llava.continual.methods.sequential import Sequential

@METHODS.register
class Sides(Sequential):
    name = "sides"

    def begin(self, context):
        super().begin(context)
        slots = context.model.retriever.pool.task("shared")
        return [*slots.A.values(), {"params": list(slots.B.values()), "lr": 0.0}]
'''
LEARN = '''
"""The projector alone trains."""
import torch
from llava.continual.methods import METHODS, Recipe

@METHODS.register
class Learn(Recipe):
    name = "learn"
    needs_keys = False

    def begin(self, context):
        return list(context.model.get_model().mm_projector.parameters())

    def write(self, context):
        context.more_files.append(lambda folder: torch.save(context.state, folder / "mm_projector.bin"))
        super().write(context)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a plug-in that is forgotten afterwards."""
    METHODS.names()
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    monkeypatch.setenv(PLUGINS, str(tmp_path / "plugins"))
    (tmp_path / "plugins").mkdir()
    return lambda name, text: (tmp_path / "plugins" / f"{name}.py").write_text(text, encoding="utf-8")


def shared(stage):
    return Pool.read(stage / "slots.pth").task("shared")


def test_a_group_trains_with_its_own_learning_rate(world, tmp_path, plugin):
    plugin("sides", SIDES)
    world.train("abd", tmp_path / "llava-start", None, "--method", "sequential", "--learning_rate", 0)
    world.train("abd", tmp_path / "llava-sides", None, "--method", "sides")
    start, sides = shared(tmp_path / "llava-start"), shared(tmp_path / "llava-sides")
    assert same(dict(start.B), dict(sides.B)) and not same(dict(start.A), dict(sides.A))


def test_groups_are_resumed(world, tmp_path, plugin, monkeypatch):
    plugin("sides", SIDES)
    steps = ("--method", "sides", "--save_strategy", "steps", "--save_steps", 1)
    world.train("abd", tmp_path / "a" / "llava-sides", None, *steps)
    broken = tmp_path / "b" / "llava-sides"
    save = llava_trainer.LLaVATrainer._save_checkpoint

    def stop_after_two(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(llava_trainer.LLaVATrainer, "_save_checkpoint", stop_after_two)
        world.train("abd", broken, None, *steps)
    world.train("abd", broken, None, *steps)
    assert shared(broken).checksum() == shared(tmp_path / "a" / "llava-sides").checksum()


def test_groups_keep_the_other_settings_of_the_optimizer():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW([{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:]}], lr=1.0)
    llava_trainer.split_groups(optimizer, [{"params": weights[1:], "lr": 0.5}])
    found = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(1, 1.0, 0.1), (1, 0.5, 0.1), (1, 0.5, 0.01)]


def test_groups_and_an_optimizer_of_deepspeed_are_refused():
    with pytest.raises(UserError, match="leave the optimizer out of DeepSpeed's json"):
        llava_trainer.split_groups(object(), [{"params": []}])


# -- a recipe of the model's own weights -------------------------------------------------------------------------------


def learn(world, stage, *more):
    words = ["--model_name_or_path", world.base, "--method", "learn", "--output_dir", stage, "--use_cpu", "True"]
    words += ["--image_folder", world.folder / "images", "--max_steps", 2, "--learning_rate", "1e-2"]
    words += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--query_cache", ""]
    return [str(word) for word in (*words, *more)]


def test_a_recipe_without_keys_trains_the_models_own_weights(world, tmp_path, plugin, capsys):
    plugin("learn", LEARN)
    stage = tmp_path / "llava-aligned"
    words = learn(world, stage, "--data_path", world.folder / "train_abd.jsonl")
    with arguments(words):
        train()
    model, *_ = load_base(str(world.base))
    before, after = model.state_dict(), load_bin(stage / "mm_projector.bin")
    assert set(after) == {name for name in before if "mm_projector" in name}
    assert not any(torch.equal(before[name], value) for name, value in after.items())
    assert not (stage / "slots.pth").exists() and (stage / "config.json").is_file()
    record = json.loads((stage / "training.json").read_text(encoding="utf-8"))
    assert record["base"] and "keys" not in record and record["task"] is None
    capsys.readouterr()
    with arguments(words):
        train()
    assert "is finished already; skipped" in capsys.readouterr().out
    with arguments([*words, "--learning_rate", "2e-2"]), pytest.raises(UserError, match="learning_rate"):
        train()


def test_a_recipe_without_keys_takes_nothing_from_the_task_sequence(world, tmp_path, plugin):
    plugin("learn", LEARN)
    values = json.loads(world.sequence.read_text(encoding="utf-8"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**values, "answer_suffix": "Briefly.", "train": {"seed": 7}}), encoding="utf-8")
    stage = tmp_path / "llava-aligned"
    with arguments(learn(world, stage, "--data_path", world.folder / "train_abd.jsonl", "--sequence", other)):
        train()
    record = json.loads((stage / "training.json").read_text(encoding="utf-8"))
    assert record["prompt"]["answer_suffix"] == "" and record["seed"] == 42


def test_a_recipe_without_keys_needs_rows(world, tmp_path, plugin, capsys):
    plugin("learn", LEARN)
    line = refusal(world, capsys, learn(world, tmp_path / "llava-aligned"))
    assert "method 'learn' has no rows of a task; add --data_path" in line


@pytest.mark.parametrize("items, steps, wanted", [(7, 4, 1 + 8 / 4), (7, 1, 9.0), (None, 4, 9.0)])
def test_what_a_recipe_adds_counts_once_a_step(monkeypatch, items, steps, wanted):
    """The cross-entropy of a part of a step is divided by the step's tokens; without their number the trainer divides
    the sum by the parts."""
    monkeypatch.setattr(llava_trainer.Trainer, "compute_loss", lambda *_: (torch.ones(()), None))
    trainer = llava_trainer.LLaVATrainer.__new__(llava_trainer.LLaVATrainer)
    trainer.recipe, trainer.context = SimpleNamespace(answers=True, loss=lambda _c, _b, _o, loss: loss + 8), None
    trainer.current_gradient_accumulation_steps = steps
    assert trainer.compute_loss(SimpleNamespace(training=True), {}, num_items_in_batch=items).item() == wanted
