"""Programs that wrap the model: ``Trainer``, accelerate, DDP, ``torch.compile``; batches of LLaVA's collator."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from clients.room import MIXED, ROWS, one_row, open_prompt, with_mark
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from llava.constants import IGNORE_INDEX
from llava.mm_utils import process_images

ANSWERS = ("yes", "left side", "no", "right")


def samples(side, loaded, rows):
    """What LLaVA's data set gives: ids, labels on the answer, and a picture, a black one where the row has none."""
    tokenizer, model, image_processor, _ = loaded
    found = []
    for row, answer in zip(rows, ANSWERS, strict=False):
        question = with_mark(model.config, row["text"]) if "image" in row else row["text"]
        asked = one_row(open_prompt(side.template, question), tokenizer, model)[0]
        reply = torch.tensor(tokenizer(f" {answer}</s>", add_special_tokens=False)["input_ids"])
        size = image_processor.crop_size
        picture = (
            process_images(side.opened(row["image"]), image_processor, model.config)[0]
            if "image" in row
            else torch.zeros(3, size["height"], size["width"])
        )
        labels = torch.cat([torch.full_like(asked, IGNORE_INDEX), reply])
        found.append({"input_ids": torch.cat([asked, reply]), "labels": labels, "image": picture})
    return found


def collate(tokenizer):
    """LLaVA's: right padding, a mask, the pictures in one tensor."""

    def batch(found):
        ids, labels = ([one[name] for one in found] for name in ("input_ids", "labels"))
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        images = torch.stack([one["image"] for one in found])
        mask = input_ids.ne(tokenizer.pad_token_id)
        return {"input_ids": input_ids, "labels": padded, "attention_mask": mask, "images": images}

    return batch


def batch_of(side, loaded, kind):
    rows = ROWS[:4] if kind == "one picture" else MIXED
    return rows, samples(side, loaded, rows)


def expected_loss(side, rows, found):
    """The mean over all answer tokens, each row alone with its question told."""
    model, total, count = side.engine.model, 0.0, 0
    for row, sample in zip(rows, found, strict=True):
        shown = [sample["image"]] if "image" in row else None
        with torch.no_grad():
            loss = model(
                input_ids=sample["input_ids"][None],
                labels=sample["labels"][None],
                images=None if shown is None else [shown],
                questions=[row["text"]],
            ).loss
        tokens = int(sample["labels"].ne(IGNORE_INDEX).sum())
        total, count = total + float(loss) * tokens, count + tokens
    return total / count


@pytest.fixture(params=["one picture", "mixed"])
def kind(request):
    return request.param


def test_trainer(side, tmp_path, kind):
    """``Trainer`` of transformers: the loss it reports, and a step of the projector alone."""
    loaded = side.load()
    tokenizer, model, _, _ = loaded
    rows, found = batch_of(side, loaded, kind)
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    before = model.get_model().mm_projector[0].weight.clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        per_device_eval_batch_size=len(rows),
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=found,
        eval_dataset=found,
        data_collator=collate(tokenizer),
        processing_class=tokenizer,
    )
    expected = expected_loss(side, rows, found)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-3)
    assert not torch.equal(model.get_model().mm_projector[0].weight, before)


def test_accelerate(side, kind):
    """A loop of one's own around a prepared model."""
    loaded = side.load()
    rows, found = batch_of(side, loaded, kind)
    accelerator = Accelerator(cpu=True)
    model = loaded[1].train().requires_grad_(False)
    projector = model.get_model().mm_projector.requires_grad_(True)
    optimizer = torch.optim.SGD(projector.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(found, batch_size=len(rows), collate_fn=collate(loaded[0]))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        outputs = model(**batch)
        assert float(outputs.loss) == pytest.approx(expected_loss(side, rows, found), rel=1e-3)
        accelerator.backward(outputs.loss)
        optimizer.step()
    assert all(parameter.grad is not None for parameter in projector.parameters())


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(side, kind, one_process):
    """The wrapper's ``forward`` is called with the batch; gradients arrive."""
    loaded = side.load()
    rows, found = batch_of(side, loaded, kind)
    model = loaded[1].train().requires_grad_(False)
    projector = model.get_model().mm_projector.requires_grad_(True)
    loss = DistributedDataParallel(model)(**collate(loaded[0])(found)).loss
    assert float(loss) == pytest.approx(expected_loss(side, rows, found), rel=1e-3)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in projector.parameters())


@pytest.mark.slow
def test_compile(sides):
    """A base and then its stage in one process: what was compiled for the base does not answer for the stage."""
    for kind in ("base", "stage"):
        side = sides["llama", kind]
        loaded = side.load()
        rows, found = ROWS[:2], samples(side, loaded, ROWS[:2])
        model = loaded[1].requires_grad_(False)
        loss = torch.compile(model, backend="eager")(**collate(loaded[0])(found)).loss
        assert float(loss) == pytest.approx(expected_loss(side, rows, found), rel=1e-3)
