"""A stage's slots as files of their tasks: what is written comes back, is linked where it is there already, and is
refused by its name where it is not what was written."""

import errno
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llava import write_base, write_stage
from tiny_world import same_slots

from llava.checkpoints.manifest import check_seal, seal
from llava.heap import own_bytes
from llava.slots import edit, parts
from llava.slots.edit import read_place, remove, rename, write_place
from llava.slots.file import content_sha256
from llava.slots.parts import part_file
from llava.slots.pool import Pool
from llava.utils import UserError

TASKS = ("abd", "chest", "head")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Three trained tasks of random numbers, read from one file."""
    folder = tmp_path_factory.mktemp("whole")
    write_base(folder / "tiny-llava-base")
    return Pool.read(write_stage(folder / "llava-stage", folder / "tiny-llava-base", TASKS) / "slots.pth")


def written(folder, pool, *earlier):
    """A stage folder of nothing but slots; returns its ``slots.pth``."""
    folder.mkdir(parents=True)
    pool.write_stage(folder / "slots.pth", [place.parent / "slots.pth" for place in earlier])
    return folder / "slots.pth"


@pytest.fixture
def stages(pool, tmp_path):
    """Two stages, the second with a task more."""
    first = written(tmp_path / "llava-one", pool.with_tasks(pool.tasks[:2]))
    return first, written(tmp_path / "llava-two", pool, first)


def same_pools(one, other):
    shared = [(pool.settings, pool.base, pool.prompt, pool.adapter, pool.names) for pool in (one, other)]
    return shared[0] == shared[1] and all(map(same_slots, one.tasks, other.tasks))


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,300}", fullmatch=True), min_size=1, max_size=3, unique=True))
def test_what_is_written_comes_back_whatever_the_tasks_are_called(pool, tmp_path_factory, names):
    named = pool.with_tasks([task.copy(name=name) for task, name in zip(pool.tasks, names, strict=False)])
    path = written(tmp_path_factory.mktemp("named") / "llava-stage", named)
    assert same_pools(Pool.read(path), named)
    assert len(list((path.parent / "slots").iterdir())) == len(names)


def test_names_that_differ_late_have_files_of_their_own(tmp_path):
    names = ["a" * 120, "a" * 121, "a" * 119 + "b", "a"]
    files = {part_file(tmp_path / "slots.pth", name).name for name in names}
    assert len(files) == 4 and max(map(len, files)) < 143


@pytest.mark.parametrize("name", ["A", "a/b", "a\\b", "", "ä", "-a"])
def test_a_name_that_no_reader_takes_is_not_written(pool, tmp_path, name):
    with pytest.raises(UserError, match="use lower-case letters"):
        written(tmp_path / "llava-stage", pool.with_tasks([pool.tasks[0].copy(name=name)]))
    assert not list((tmp_path / "llava-stage").iterdir())


def test_targets_and_what_a_task_may_lack_come_back_in_their_order(pool, tmp_path):
    task = pool.task("abd")
    sides = {side: {"q_proj": torch.rand(1, 2, 3, 4), "v_proj": torch.rand(4, 3, 2, 1)} for side in "AB"}
    tasks = [
        task.copy(name="bare", A=None, B=None, extent=None, statistics=None, text_keys=None, info={}),
        task.copy(name="whole", start=90, stop=94, **sides, held_out={"text": torch.rand(2, 3)}),
    ]
    made = Pool(pool.settings, tasks, pool.base, {"conv_mode": "vicuna_v1"}, "l2p")
    found = Pool.read(written(tmp_path / "llava-stage", made))
    assert same_pools(found, made) and list(found.task("whole").A) == ["q_proj", "v_proj"]
    assert found.task("bare").statistics is None and not found.task("bare").B
    found.write(tmp_path / "again.pth")
    made.write(tmp_path / "made.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "made.pth").read_bytes()


@pytest.mark.skipif(not own_bytes(), reason="this system does not tell what a process takes")
def test_numbers_that_nobody_uses_take_no_memory_and_changed_ones_stay_in_the_process(tmp_path):
    whole = [{"name": "large", "A": {"o_proj": torch.ones(10 << 20)}}]  # 40 MB
    entries = parts.write_parts(tmp_path / "slots.pth", whole)
    content, before = part_file(tmp_path / "slots.pth", "large").read_bytes(), own_bytes()
    [found] = parts.read_parts(tmp_path / "slots.pth", entries)
    assert own_bytes() - before < 10 << 20
    found["A"]["o_proj"].zero_()  # as training changes a task's own
    assert part_file(tmp_path / "slots.pth", "large").read_bytes() == content


def test_a_stage_without_tasks_is_one_small_file(pool, tmp_path):
    path = written(tmp_path / "llava-none", pool.with_tasks([]))
    assert Pool.read(path).names == [] and [file.name for file in path.parent.iterdir()] == ["slots.pth"]


def test_a_task_has_the_same_bytes_in_every_stage_and_is_linked(pool, stages, tmp_path):
    first, second = stages
    for name in ("abd", "chest"):
        assert part_file(first, name).samefile(part_file(second, name))
    assert part_file(second, "head").stat().st_nlink == 1
    alone = written(tmp_path / "llava-alone", pool)
    assert alone.read_bytes() == second.read_bytes()
    for name in TASKS:
        assert part_file(alone, name).read_bytes() == part_file(second, name).read_bytes()


def test_another_base_or_name_shares_the_numbers(pool, stages, tmp_path):
    moved = Pool(pool.settings, [pool.task("abd").copy(name="belly")], {"path": "elsewhere"})
    path = written(tmp_path / "llava-moved", moved, stages[0])
    assert part_file(path, "belly").samefile(part_file(stages[0], "abd")) and same_pools(Pool.read(path), moved)


def test_changed_numbers_are_written_anew(pool, stages, tmp_path):
    changed = Pool.read(stages[1])
    changed.task("abd").A["o_proj"].data += 1
    path = written(tmp_path / "llava-changed", changed, stages[1])
    assert not part_file(path, "abd").samefile(part_file(stages[1], "abd"))
    assert same_pools(Pool.read(path), changed) and same_pools(Pool.read(stages[1]), pool)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_linked_files_are_copied(pool, stages, tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    path = written(tmp_path / "llava-copied", pool, stages[1])
    assert path.read_bytes() == stages[1].read_bytes() and same_pools(Pool.read(path), pool)
    assert all(part_file(path, name).stat().st_nlink == 1 for name in TASKS)


def test_a_link_to_an_earlier_file_is_followed(pool, stages, tmp_path):
    """A hub's cache keeps files elsewhere, under links."""
    kept = part_file(stages[0], "abd").rename(tmp_path / "blob")
    part_file(stages[0], "abd").symlink_to(kept)
    path = written(tmp_path / "llava-after", pool, stages[0])
    assert not part_file(path, "abd").is_symlink() and part_file(path, "abd").samefile(kept)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index", "no index"])
def test_what_is_damaged_in_the_stage_before_is_written_anew(pool, stages, tmp_path, damage):
    """Its slots were read hours ago, whole."""
    file = part_file(stages[0], "abd")
    if damage == "flip":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "gone":
        file.unlink()
    elif damage == "index":
        stages[0].write_bytes(b"half of it")
    else:
        stages[0].unlink()
    path = written(tmp_path / "llava-after", pool, stages[0])
    assert same_pools(Pool.read(path), pool) and part_file(path, "abd").stat().st_nlink == 1


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "swapped", "another's", "folder"])
def test_a_file_that_is_not_the_one_that_was_written_is_named(pool, stages, tmp_path, damage, name):
    path = tmp_path / f"llava-{name}" / "slots.pth"
    file, data = part_file(path, "abd"), part_file(path, "abd").read_bytes()
    file.unlink()  # it is shared
    if damage in ("flip", "cut", "empty"):
        place = len(data) // 2
        file.write_bytes(
            {"flip": data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], "cut": data[:-1]}.get(damage, b"")
        )
    elif damage == "swapped":
        part_file(path, "chest").rename(file)
        part_file(path, "chest").write_bytes(data)
    elif damage == "another's":
        torch.manual_seed(3)
        other = pool.task("abd").copy(A={"o_proj": torch.rand_like(pool.task("abd").A["o_proj"])})
        shutil.copyfile(part_file(written(tmp_path / "llava-other", pool.with_tasks([other])), "abd"), file)
    elif damage == "folder":
        shutil.rmtree(path.parent / "slots")
    with pytest.raises(UserError, match=r"slots/abd\.safetensors: is (gone|not the file that was written)") as refused:
        Pool.read(path)
    assert "\n" not in str(refused.value)


def test_a_file_of_no_task_is_named(stages):
    shutil.copyfile(part_file(stages[1], "head"), part_file(stages[0], "head"))
    with pytest.raises(UserError, match=r"slots/head\.safetensors: belongs to no task of .*one/slots\.pth; remove it"):
        Pool.read(stages[0])


def test_an_index_without_its_folder_says_what_to_copy(stages, tmp_path):
    shutil.copyfile(stages[1], tmp_path / "copied.pth")
    with pytest.raises(UserError, match="slots/abd.safetensors: is gone, and .*copied.pth names it; copy the stage's"):
        Pool.read(tmp_path / "copied.pth")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["tasks"][0].update(name="../../abd"),
        lambda data: data["tasks"][0].update(name="chest"),
        lambda data: data["tasks"][0].pop("sha256"),
        lambda data: data["tasks"][0].update(sha256=7),
        lambda data: data["tasks"][0].update(tensors=[["A"]]),
        lambda data: data["tasks"][0].update(tensors=[[]]),
        lambda data: data["tasks"][0].update(tensors=[["name", "o_proj"]]),
        lambda data: data["tasks"][0].update(tensors=3),
        lambda data: data["tasks"][0].pop("trained"),
        lambda data: data["tasks"][0].update(A=[1]),
        lambda data: data["tasks"][0].update(start=-1),
        lambda data: data["tasks"].append(3),
        lambda data: data.update(tasks=3),
        lambda data: data.pop("settings"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_an_index_of_other_content_is_one_line(stages, change, whole):
    """With a checksum that fits, as somebody else may make one, and without."""
    data = torch.load(stages[0], weights_only=True)
    del data["checksum"]
    change(data)
    if whole:
        data["checksum"] = content_sha256(data)
    torch.save(data, stages[0])
    with pytest.raises(UserError, match=r"one/slots") as refused:
        Pool.read(stages[0])
    assert "\n" not in str(refused.value)


def test_one_bit_of_an_index_never_makes_another_pool(stages, pool):
    data, kept = stages[1].read_bytes(), Pool.read(stages[1])
    for number in range(60):
        at = (len(data) - 1) * number // 59
        stages[1].write_bytes(bytes([*data[:at], data[at] ^ 4, *data[at + 1 :]]))
        try:
            found = Pool.read(stages[1])
        except UserError as error:
            assert str(error).startswith(str(stages[1].parent))
        else:  # the bit lay between what is read
            assert same_pools(found, kept)


# -- edits in place ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(stages):
    """The same, with lists of their files and something beside."""
    for path in stages:
        (path.parent / "config.json").write_text("{}")
        (path.parent / "notes").mkdir()
        (path.parent / "notes" / "mine.txt").write_text("mine")
        seal(path.parent)
    return [path.parent for path in stages]


def everything(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_task_that_is_taken_out_in_place_is_gone_and_the_stage_before_is_as_it_was(pool, sealed):
    before, rights = everything(sealed[0]), part_file(sealed[0] / "slots.pth", "abd").stat()
    write_place(remove(read_place(sealed[1]), ["chest"]), sealed[1], [sealed[1]], "removal")
    check_seal(sealed[1])
    assert read_place(sealed[1]).names == ["abd", "head"]
    assert sorted(os.listdir(sealed[1] / "slots")) == ["abd.safetensors", "head.safetensors"]
    assert (sealed[1] / "notes" / "mine.txt").read_text() == "mine" and (sealed[1] / "config.json").is_file()
    assert part_file(sealed[1] / "slots.pth", "abd").samefile(part_file(sealed[0] / "slots.pth", "abd"))
    now = part_file(sealed[0] / "slots.pth", "abd").stat()
    assert everything(sealed[0]) == before and (now.st_mode, now.st_mtime_ns) == (rights.st_mode, rights.st_mtime_ns)
    never = written(sealed[0].with_name("llava-never"), pool.with_tasks([pool.task("abd"), pool.task("head")]))
    assert (sealed[1] / "slots.pth").read_bytes() == never.read_bytes()


def test_a_task_is_renamed_in_place_with_its_file(sealed):
    before = everything(sealed[0])
    write_place(rename(read_place(sealed[1]), "abd", "belly"), sealed[1], [sealed[1]], "renaming")
    assert read_place(sealed[1]).names == ["belly", "chest", "head"] and everything(sealed[0]) == before
    assert part_file(sealed[1] / "slots.pth", "belly").samefile(part_file(sealed[0] / "slots.pth", "abd"))


@pytest.mark.parametrize("broken", [(edit, "write_slots_card"), (parts, "link_or_copy"), (torch, "save")])
def test_an_edit_that_fails_leaves_the_stage(sealed, monkeypatch, broken):
    before = everything(sealed[1])
    left = remove(read_place(sealed[1]), ["chest"])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*broken, full)
    with pytest.raises(OSError, match="No space left"):
        write_place(left, sealed[1], [sealed[1]], "removal")
    assert everything(sealed[1]) == before and len(list(sealed[1].parent.iterdir())) == 2


def test_a_shared_file_that_may_not_be_written_to_stays_so(pool, sealed, tmp_path):
    file = part_file(sealed[0] / "slots.pth", "abd")
    file.chmod(0o444)
    write_place(remove(read_place(sealed[1]), ["head"]), sealed[1], [sealed[1]], "removal")
    assert file.stat().st_mode & 0o777 == 0o444 and file.stat().st_nlink == 2


def test_a_stage_of_one_file_is_edited_and_followed(pool, tmp_path):
    """As earlier versions wrote it."""
    old = tmp_path / "llava-old"
    old.mkdir()
    pool.write(old / "slots.pth")
    seal(old)
    following = written(tmp_path / "llava-after", pool, old / "slots.pth")
    assert same_pools(Pool.read(following), pool)
    write_place(remove(read_place(old), ["head"]), old, [old], "removal")
    check_seal(old)
    assert read_place(old).names == ["abd", "chest"] and part_file(old / "slots.pth", "abd").is_file()
