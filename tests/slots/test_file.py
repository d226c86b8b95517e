"""The slot file: what is written comes back bit for bit; anything else is refused with the file's name."""

import hashlib
import pickle

import pytest
import torch
from tiny_llava import GROUPS, HIDDEN, RANK, SLOTS, VISION, write_base, write_stage
from tiny_world import same_slots

from llava.slots.file import (
    SlotFile,
    load_task_offsets,
    read_prototype_keys,
    read_slot_file,
    retriever_from,
    write_slot_file,
)
from llava.slots.pool import RetrieverSettings
from llava.utils import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file with two trained tasks."""
    folder = tmp_path_factory.mktemp("slots")
    write_base(folder / "tiny-llava-base")
    return write_stage(folder / "llava-stage", folder / "tiny-llava-base") / "slots.pth"


def altered(written, target, change):
    """A copy of the file's plain data, changed and saved again."""
    data = torch.load(written, weights_only=True)
    change(data)
    torch.save(data, target)
    return target


def test_round_trip_is_bit_for_bit_and_its_bytes_repeat(written, tmp_path):
    slots = read_slot_file(written)
    write_slot_file(tmp_path / "again.pth", slots)
    again = read_slot_file(tmp_path / "again.pth")
    assert all(same_slots(one, other) for one, other in zip(slots.tasks, again.tasks, strict=True))
    assert again.settings == slots.settings and again.base == slots.base
    assert (tmp_path / "again.pth").read_bytes() == written.read_bytes()


def test_the_order_in_which_tasks_are_given_leaves_the_bytes_alone(written, tmp_path):
    slots = read_slot_file(written)
    write_slot_file(tmp_path / "turned.pth", SlotFile(slots.settings, slots.tasks[::-1], slots.base))
    assert (tmp_path / "turned.pth").read_bytes() == written.read_bytes()


def test_the_file_holds_tensors_and_plain_containers_in_the_fixed_layout(written):
    data = torch.load(written, weights_only=True)
    assert data["format"] == "llava-slots" and data["version"] == 1
    assert data["keys"].shape == (1, GROUPS, 2 * SLOTS, HIDDEN // GROUPS)
    assert data["image_keys"].shape == (1, GROUPS, 2 * SLOTS, VISION // GROUPS)
    assert [(task["name"], task["start"], task["stop"]) for task in data["tasks"]] == [
        ("abd", 0, SLOTS),
        ("chest", SLOTS, 2 * SLOTS),
    ]
    assert data["offsets"]["chest"]["A"]["o_proj"].shape[:3] == (SLOTS, 2, RANK)


def test_a_retriever_and_back(written):
    slots = read_slot_file(written)
    pool = retriever_from(slots)
    assert pool.tasks == ["abd", "chest"] and pool.slot_range("chest") == range(SLOTS, 2 * SLOTS)
    for task in slots.tasks:
        block = pool.block(task.name)
        assert torch.equal(block.text_keys, task.text_keys) and torch.equal(block.image_keys, task.image_keys)
        assert torch.equal(block.A["o_proj"], task.A["o_proj"]) and torch.equal(block.B["o_proj"], task.B["o_proj"])
        assert block.trained and block.statistics is task.statistics
    with pytest.raises(UserError, match="no slots for task 'head'; the file knows \\['abd', 'chest'\\]"):
        slots.task("head")


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(written, tmp_path, cut):
    data = written.read_bytes()
    broken = tmp_path / "cut.pth"
    broken.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(UserError, match="cut.pth: cannot be read as a slot file"):
        read_slot_file(broken)


def test_only_plain_data_is_ever_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"format": "llava-slots", "x": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as a slot file"):
            read_slot_file(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weights": torch.zeros(2)}, "not a slot file .no format mark 'llava-slots'"),
        ([1, 2], "holds a list, not a slot file"),
        ({"format": "llava-slots", "version": 9}, "slot file version 9, this package reads up to 1"),
        ({"format": "llava-slots", "version": 1}, "the slot file is incomplete or damaged .no field 'settings'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth: {message}"):
        read_slot_file(tmp_path / "other.pth")


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="slot file not found: .*absent.pth .make it with train_prompt_key.py"):
        read_slot_file(tmp_path / "absent.pth")


def _without(name):
    def change(data):
        del data["tasks"][0][name]

    return change


def _set(*path, value):
    def change(data):
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


def _poison(*path):
    def change(data):
        for step in path:
            data = data[step]
        data.view(-1)[3] = torch.nan

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_without("start"), "no field 'start'"),
        (_set("tasks", value=None), "incomplete or damaged"),
        (_set("settings", "router", value="compass"), "unknown router 'compass'"),
        (_set("tasks", 1, "stop", value=3 * SLOTS), "keys for 8 slots, but its tasks have 12"),
        (_poison("keys"), "text_keys of task 'abd' holds NaN"),
        (_poison("image_keys"), "image_keys of task 'abd' holds NaN"),
        (_poison("offsets", "chest", "A", "o_proj"), "A.o_proj of task 'chest' holds NaN"),
        (_poison("tasks", 1, "statistics", "scatter"), "statistics.scatter of task 'chest' holds NaN"),
    ],
)
def test_damage_inside_is_named(written, tmp_path, change, message):
    with pytest.raises(UserError, match=f"bad.pth: .*{message}"):
        read_slot_file(altered(written, tmp_path / "bad.pth", change))


def test_shapes_that_do_not_fit_the_settings_are_refused(written):
    slots = read_slot_file(written)
    slots.tasks[1].A["o_proj"] = slots.tasks[1].A["o_proj"][:1]  # copying would silently repeat it
    with pytest.raises(
        UserError, match=r"task 'chest': offset A of o_proj has shape \(1, 2, 2, 32\), .* \(4, 2, 2, 32\)"
    ):
        retriever_from(slots)
    slots = read_slot_file(written)
    slots.tasks[0].B["q_proj"] = slots.tasks[0].B.pop("o_proj")
    with pytest.raises(UserError, match="offset B of q_proj .* the settings ask for none"):
        retriever_from(slots)
    slots = read_slot_file(written)
    slots.tasks[0].text_keys = None
    with pytest.raises(UserError, match=r"task 'abd': keys of shape none, but the settings ask for \(4, 4, 8\)"):
        retriever_from(slots)
    pool = retriever_from(read_slot_file(written))
    with pytest.raises(ValueError, match="no slots for task 'head'"):
        load_task_offsets(pool, _renamed(read_slot_file(written).tasks[0], "head"))


def _renamed(task, name):
    task.name = name
    return task


def test_the_prototypes_bare_key_table(tmp_path):
    table = torch.randn(1, 4, 24, 192)
    torch.save({"keys": table}, tmp_path / "proto.pth")
    with pytest.raises(UserError, match="proto.pth: a bare key table without tasks"):
        read_slot_file(tmp_path / "proto.pth")
    settings = RetrieverSettings(1, {"o_proj": (8, 8)}, text_dim=768, query_mode="text", router="keys")
    slots = read_prototype_keys(tmp_path / "proto.pth", {"abd": (0, 8), "head": (16, 24)}, settings)
    assert torch.equal(slots.task("head").text_keys, table[0, :, 16:24])
    pool = retriever_from(slots)
    assert pool.pool_size == 16 and not pool.active
    with pytest.raises(UserError, match=r"holds 24 slots, but task 'knee' is said to be at \(24, 32\)"):
        read_prototype_keys(tmp_path / "proto.pth", {"knee": (24, 32)}, settings)
    torch.save({"keys": torch.zeros(3)}, tmp_path / "flat.pth")
    with pytest.raises(UserError, match="flat.pth: expected a tensor 'keys' of shape"):
        read_prototype_keys(tmp_path / "flat.pth", {"abd": (0, 8)}, settings)


def test_a_failed_write_leaves_the_old_file(written, tmp_path, monkeypatch):
    target = tmp_path / "slots.pth"
    target.write_bytes(written.read_bytes())
    digest = hashlib.sha256(target.read_bytes()).hexdigest()

    def full(data, stream):
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_slot_file(target, read_slot_file(written))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert [path.name for path in tmp_path.iterdir()] == ["slots.pth"]
