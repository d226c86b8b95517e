"""The slot file: what is written comes back bit for bit; anything else is refused with the file's name."""

import hashlib
import math
import pickle
import sys

import pytest
import torch
from tiny_llava import GROUPS, HIDDEN, RANK, SLOTS, VISION, write_base, write_stage
from tiny_world import same, same_slots

from llava.model.language_model.retriever import Retriever
from llava.slots.pool import Pool
from llava.slots.queries import TaskStatistics
from llava.slots.task_slots import TaskSlots
from llava.slots.unknown import TaskExtent
from llava.utils import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file with two trained tasks."""
    folder = tmp_path_factory.mktemp("slots")
    write_base(folder / "tiny-llava-base")
    return write_stage(folder / "llava-stage", folder / "tiny-llava-base") / "slots.pth"


def altered(written, target, change):
    """A copy of the file's plain data, changed and saved again, as an earlier version would have: without checksum."""
    data = torch.load(written, weights_only=True)
    del data["checksum"]
    change(data)
    torch.save(data, target)
    return target


def nested(data):
    info: dict = {}
    for _ in range(3000):
        info = {"deeper": info}
    data["tasks"][0]["info"] = info


def sparse(data):
    data["keys"] = data["keys"].to_sparse()


@pytest.mark.parametrize("change", [nested, sparse])
def test_content_that_no_checksum_can_be_made_of_is_named(change, written, tmp_path):
    """torch reads such files; both ended in a traceback."""
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(60_000)  # to write one

    def unlike(data):
        change(data)
        data["checksum"] = "0" * 16

    try:
        target = altered(written, tmp_path / "slots.pth", unlike)
    finally:
        sys.setrecursionlimit(usual)
    with pytest.raises(UserError, match="slots.pth: ") as refused:
        Pool.read(target)
    assert "\n" not in str(refused.value)


def test_round_trip_is_bit_for_bit_and_its_bytes_repeat(written, tmp_path):
    slots = Pool.read(written)
    slots.write(tmp_path / "again.pth")
    again = Pool.read(tmp_path / "again.pth")
    assert all(same_slots(one, other) for one, other in zip(slots.tasks, again.tasks, strict=True))
    assert again.settings == slots.settings and again.base == slots.base
    assert (tmp_path / "again.pth").read_bytes() == written.read_bytes()


@pytest.mark.parametrize("place", range(0, 19))
def test_one_bit_of_a_slot_file_never_makes_another_pool(written, tmp_path, place):
    """A flipped bit in keys, offsets or settings gave other answers, and training went on with it."""
    data = bytearray(written.read_bytes())
    target = tmp_path / "slots.pth"
    for number in range(3):
        at = (len(data) - 1) * (3 * place + number) // 56
        target.write_bytes(bytes([*data[:at], data[at] ^ 4, *data[at + 1 :]]))
        try:
            found = Pool.read(target)
        except UserError as error:
            assert str(error).startswith(f"{target}: ")
        else:  # the bit lay between what is read
            found.write(tmp_path / "again.pth")
            assert (tmp_path / "again.pth").read_bytes() == written.read_bytes()


def test_settings_and_numbers_are_those_that_were_written(written, tmp_path):
    for change in (
        lambda data: data["settings"].update(tau=data["settings"]["tau"] * 2),
        lambda data: data["offsets"]["abd"]["A"]["o_proj"].add_(1),
        lambda data: data["tasks"][0].update(trained=False),
    ):
        data = torch.load(written, weights_only=True)
        change(data)
        torch.save(data, tmp_path / "slots.pth")
        with pytest.raises(UserError, match=r"slots\.pth: is damaged, its checksum"):
            Pool.read(tmp_path / "slots.pth")
    with pytest.raises(UserError, match=r"task 'abd' is damaged"):  # as earlier versions wrote it
        Pool.read(altered(written, tmp_path / "old.pth", lambda data: data["offsets"]["abd"]["A"]["o_proj"].add_(1)))


def test_the_order_in_which_tasks_are_given_leaves_the_bytes_alone(written, tmp_path):
    slots = Pool.read(written)
    Pool(slots.settings, slots.tasks[::-1], slots.base).write(tmp_path / "turned.pth")
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


EXTENT = {"mean": (5,), "directions": (3, 5), "variances": (3,), "rest": (), "distances": (9,)}


def as_old_versions_wrote(written, target, prompt=None):
    """The file made by hand: nothing here goes through the classes that read and write."""
    generator = torch.Generator().manual_seed(4)
    settings = torch.load(written, weights_only=True)["settings"] | {"features": {"q_proj": (8, 8), "o_proj": (8, 6)}}

    def random(*shape):
        return torch.randn(shape, generator=generator)

    def entry(name, start, extent, held_out):
        statistics = {"count": 9, "total": random(5), "scatter": random(5, 5)}
        info = {"rows": 9, "data": ["a.jsonl:0123"], "seed": 42, "mixture": [0.25, 0.75]}
        return {
            "name": name,
            "start": start,
            "stop": start + 2,
            "trained": name == "abd",
            "statistics": statistics,
            "feature_statistics": statistics if extent else None,
            "extent": {name: random(*shape) for name, shape in EXTENT.items()} if extent else None,
            "held_out": {"text": random(2, 4)} if held_out else None,
            "info": info,
            "checksum": "",
        }

    def offsets(*targets):
        return {kind: {target: random(2, 2, 2, 8) for target in targets} for kind in ("A", "B")}

    data = {
        "format": "llava-slots",
        "version": 1,
        "settings": settings,
        "base": {"path": "some/base", "fingerprint": "0123"},
        "keys": random(1, GROUPS, 6, HIDDEN // GROUPS),
        "image_keys": None,
        "tasks": [entry("abd", 0, True, True), entry("chest", 4, False, False), entry("knee", 8, False, True)],
        "offsets": {"abd": offsets("q_proj", "o_proj"), "chest": offsets("o_proj", "q_proj")},
    }
    if prompt:
        data["prompt"] = prompt
    torch.save(data, target)
    checksums = {task.name: task.checksum() for task in Pool.read(target).tasks}
    for stored in data["tasks"]:
        stored["checksum"] = checksums[stored["name"]]
    with target.open("wb") as stream:
        torch.save(copied(data), stream)
    return target


def copied(value):
    """Without parts that occur twice, which pickle would write as references."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {copied(key): copied(part) for key, part in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("prompt", [None, {"conv_mode": "vicuna_v1", "answer_suffix": ""}])
def test_a_file_read_and_written_again_keeps_what_it_holds(written, tmp_path, prompt):
    """Gaps between slot ranges, tasks without offsets or calibration, several targets in an order of their own."""
    old = as_old_versions_wrote(written, tmp_path / "old.pth", prompt)
    pool = Pool.read(old)
    pool.write(tmp_path / "again.pth")
    before, after = (torch.load(path, weights_only=True) for path in (old, tmp_path / "again.pth"))
    assert after.pop("checksum") and same(after, before)
    assert pool.prompt == (prompt or {}) and not pool.task("knee").B
    pool.with_tasks(pool.tasks).write(tmp_path / "third.pth")
    assert (tmp_path / "third.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()


def test_a_tasks_checksum_is_that_of_the_versions_before():
    def numbers(*shape):
        return torch.arange(float(math.prod(shape))).reshape(shape)

    more = {"A": {"o_proj": numbers(2, 1, 2, 3)}, "B": {"o_proj": numbers(2, 1, 2, 4)}}
    statistics, extent = TaskStatistics(7, numbers(3), numbers(3, 3)), TaskExtent(*map(numbers, (3, 2, 2, 1, 5)))
    whole = TaskSlots("abd", 4, 6, numbers(2, 2, 3), None, statistics, extent=extent, trained=True, **more)
    assert whole.checksum() == "7baf0d901120df2e"
    assert TaskSlots("chest", 0, 2, None, numbers(2, 2, 3)).checksum() == "997e7830c59badb0"


def test_a_pool_holds_what_the_file_holds(written):
    pool = Pool.read(written)
    assert pool.names == ["abd", "chest"] and pool.slot_range("chest") == range(SLOTS, 2 * SLOTS)
    assert pool.size == 2 * SLOTS and pool.active and not any(p.requires_grad for p in pool.parameters())
    names = [name for name, _ in pool.named_parameters()]
    assert [name.split(".", 2)[2] for name in names] == ["A.o_proj", "B.o_proj"] * 2
    with pytest.raises(UserError, match="no slots for task 'head'; the pool knows \\['abd', 'chest'\\]"):
        pool.task("head")


def test_a_changed_copy_shares_its_numbers_and_leaves_the_task_alone(written):
    task = Pool.read(written).task("chest")
    moved = task.copy(name="lung", start=40, stop=40 + SLOTS, held_out=None)
    assert (task.name, task.start) == ("chest", SLOTS) and (moved.name, moved.count) == ("lung", SLOTS)
    assert moved.checksum() == task.checksum()
    assert moved.text_keys is task.text_keys and moved.B["o_proj"].data_ptr() == task.B["o_proj"].data_ptr()


def test_tasks_stand_in_slot_order_whatever_the_order_in_which_they_come(written):
    pool = Pool.read(written)
    late = TaskSlots.empty(pool.settings, "late", 90, 2)
    empty = TaskSlots.empty(pool.settings, "early", 0, SLOTS)
    turned = Pool(pool.settings, [late, *pool.tasks[::-1]])
    assert turned.names == ["abd", "chest", "late"]
    turned.remove("abd")
    turned.add(empty)
    assert turned.names == ["early", "chest", "late"] and turned.slot_range("late") == range(8, 10)
    assert turned.append("last", 3).start == 92
    with pytest.raises(UserError, match="already has slots for task 'chest'"):
        turned.add(pool.task("chest"))


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(written, tmp_path, cut):
    data = written.read_bytes()
    broken = tmp_path / "cut.pth"
    broken.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(UserError, match="cut.pth: cannot be read as a slot file"):
        Pool.read(broken)


def test_only_plain_data_is_ever_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"format": "llava-slots", "x": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as a slot file"):
            Pool.read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weights": torch.zeros(2)}, "not a slot file .no format mark 'llava-slots'"),
        ([1, 2], "holds a list, not a slot file"),
        ({"format": "llava-slots", "version": 9}, "slot file version 9, this package reads up to 2"),
        ({"format": "llava-slots", "version": 1}, "the slot file is incomplete or damaged .no field 'settings'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth: {message}"):
        Pool.read(tmp_path / "other.pth")


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="slot file not found: .*absent.pth .make it with train_prompt_key.py"):
        Pool.read(tmp_path / "absent.pth")


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
        Pool.read(altered(written, tmp_path / "bad.pth", change))


def test_shapes_that_do_not_fit_the_settings_are_refused(written):
    slots = Pool.read(written)
    slots.tasks[1].A["o_proj"] = slots.tasks[1].A["o_proj"][:1]
    with pytest.raises(
        UserError, match=r"task 'chest': offset A of o_proj has shape \(1, 2, 2, 32\), .* \(4, 2, 2, 32\)"
    ):
        Retriever(slots)
    slots = Pool.read(written)
    slots.tasks[0].B["q_proj"] = slots.tasks[0].B.pop("o_proj")
    with pytest.raises(UserError, match="offset B of q_proj .* the settings ask for none"):
        Retriever(slots)
    slots = Pool.read(written)
    slots.tasks[0].text_keys = None
    with pytest.raises(UserError, match=r"task 'abd': keys of shape none, but the settings ask for \(4, 4, 8\)"):
        Retriever(slots)


def test_offsets_that_are_missing_on_one_side_are_refused(written):
    slots = Pool.read(written)
    del slots.tasks[0].A["o_proj"]
    with pytest.raises(UserError, match="task 'abd': no offset A of o_proj"):
        Retriever(slots)


def test_a_key_files_tasks_get_initial_offsets_in_a_model(written):
    slots = Pool.read(written)
    bare = slots.with_tasks([task.copy(A=None, B=None) for task in slots.tasks])
    held = Retriever(bare).pool.task("abd")
    assert not held.A["o_proj"].any() and held.B["o_proj"].abs().min() > 0
    assert not bare.task("abd").B  # the file's own task stays as it was


def test_the_prototypes_bare_key_table_says_how_to_read_it(tmp_path):
    torch.save({"keys": torch.randn(1, 4, 24, 192)}, tmp_path / "proto.pth")
    with pytest.raises(UserError, match="proto.pth: a bare key table without tasks.*import-prototype"):
        Pool.read(tmp_path / "proto.pth")


def test_a_failed_write_leaves_the_old_file(written, tmp_path, monkeypatch):
    target = tmp_path / "slots.pth"
    target.write_bytes(written.read_bytes())
    digest = hashlib.sha256(target.read_bytes()).hexdigest()

    def full(data, stream):
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        Pool.read(written).write(target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert [path.name for path in tmp_path.iterdir()] == ["slots.pth"]
