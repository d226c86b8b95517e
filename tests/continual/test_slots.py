"""Life of slots: the commands of ``python -m llava.continual.slots`` on key files, merged files and stages."""

import sys

import pytest
import torch
from tiny_llava import GROUPS, HIDDEN, LAYERS, SLOTS, write_base, write_stage

from llava.continual import slots as cli
from llava.model.builder import load_pretrained_model
from llava.slots import edit
from llava.slots.edit import merge, read_place, remove
from llava.slots.peft_export import export_peft, fixed_mixture
from llava.slots.pool import Pool
from llava.utils import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llava-base")


@pytest.fixture
def stage(tmp_path, base):
    folder = write_stage(tmp_path / "llava-all", base, ("abd", "chest", "head"))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["slots", *map(str, words)])
        cli.main()

    return call


def part(source, target, *names):
    """A slot file with some of the tasks of a place."""
    slots = read_place(source)
    slots.with_tasks([slots.task(name) for name in names]).write(target)
    return target


def same_slots(one, other):
    a, b = read_place(one), read_place(other)
    assert [(t.name, t.start, t.stop) for t in a.tasks] == [(t.name, t.start, t.stop) for t in b.tasks]
    for mine, theirs in zip(a.tasks, b.tasks, strict=True):
        assert mine.checksum() == theirs.checksum()
        for name, tensor in mine.tensors().items():
            assert torch.equal(tensor, theirs.tensors()[name]), name


def test_list_shows_tasks_slots_and_checksums(run, stage, capsys):
    run("list", stage)
    shown = capsys.readouterr().out
    for task in read_place(stage).tasks:
        assert task.name in shown and task.checksum() in shown
    assert "slots    4-7" in shown and "trained" in shown and "router gaussian" in shown


def test_trained_slots_of_different_machines_merge_to_those_of_one(run, stage, tmp_path):
    a, b = part(stage, tmp_path / "a.pth", "chest"), part(stage, tmp_path / "b.pth", "head", "abd")
    run("merge", b, a, "--output", tmp_path / "one.pth")
    run("merge", a, b, "--output", tmp_path / "other.pth")
    same_slots(tmp_path / "one.pth", stage)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()


def test_a_task_carried_along_by_a_later_stage_is_taken_once(run, stage, tmp_path):
    first, later = part(stage, tmp_path / "a.pth", "abd"), part(stage, tmp_path / "b.pth", "abd", "chest")
    run("merge", first, later, "--output", tmp_path / "m.pth")
    same_slots(tmp_path / "m.pth", part(stage, tmp_path / "want.pth", "abd", "chest"))


def test_merge_names_both_places_when_a_task_differs(stage, base, tmp_path):
    other = write_stage(tmp_path / "llava-other", base, ("abd",), seed=9)
    with pytest.raises(UserError, match=r"llava-all and .*llava-other both hold task 'abd', with different numbers"):
        merge([stage, other])


def test_independently_numbered_slots_merge_when_packed(run, base, stage, tmp_path):
    other = write_stage(tmp_path / "llava-other", base, ("spine",), seed=9)
    with pytest.raises(UserError, match="slots overlap"):
        merge([stage, other])
    run("merge", stage, other, "--pack", "--output", tmp_path / "llava-packed")
    packed = read_place(tmp_path / "llava-packed")
    assert [(task.name, task.start) for task in packed.tasks] == [("abd", 0), ("chest", 4), ("head", 8), ("spine", 12)]
    assert (tmp_path / "llava-packed" / "config.json").is_file()


def test_pools_of_pictures_cut_differently_do_not_merge_and_the_prompt_is_kept(stage, tmp_path):
    places = [part(stage, tmp_path / f"{name}.pth", name) for name in ("abd", "chest", "head")]
    for place, mode in ((places[0], "pad"), (places[2], "square")):
        pool = read_place(place)
        pool.prompt = {"aspect_ratio": mode}
        pool.write(place)
    assert merge(places[:2]).prompt == merge(places[1::-1]).prompt == {"aspect_ratio": "pad"}
    assert remove(merge(places[:2]), ["abd"]).prompt == {"aspect_ratio": "pad"}
    with pytest.raises(UserError, match=r"abd\.pth and .*head\.pth were fitted to pictures of different modes, pad"):
        merge(places)


def test_removal_leaves_the_bytes_of_a_file_that_never_had_the_task(run, stage, tmp_path):
    run("remove", stage, "chest", "--output", tmp_path / "left.pth")
    never = part(stage, tmp_path / "left2.pth", "abd", "head")
    assert (tmp_path / "left.pth").read_bytes() == never.read_bytes()
    assert [task.name for task in read_place(stage).tasks] == ["abd", "chest", "head"]  # the source is untouched
    run("remove", stage, "chest")  # in place
    same_slots(stage, never)


def test_a_stage_that_is_written_elsewhere_appears_whole_or_not_at_all(run, stage, tmp_path, monkeypatch):
    """Slots without their list of checksums were taken for the whole stage by the next run, which wrote no list."""

    def fail(folder):
        raise OSError("of the disk")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="of the disk"):
        broken.setattr(edit, "seal", fail)
        run("remove", stage, "chest", "--output", tmp_path / "llava-left")
    assert sorted(tmp_path.iterdir()) == [stage]
    run("remove", stage, "chest", "--output", tmp_path / "llava-left")
    assert (tmp_path / "llava-left" / "checksums.json").is_file()
    assert (tmp_path / "llava-left" / "README.md").read_text().count("# llava-left\n") == 1


def test_a_stage_is_not_written_into_a_folder_of_other_things(run, stage, tmp_path):
    (tmp_path / "llava-mine").mkdir()
    (tmp_path / "llava-mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"llava-mine: is there already and is no stage checkpoint; give a new folder"):
        run("remove", stage, "chest", "--output", tmp_path / "llava-mine")
    assert [path.name for path in (tmp_path / "llava-mine").iterdir()] == ["notes.txt"]


def test_removal_refuses_an_unknown_task_and_an_empty_result(run, stage):
    with pytest.raises(UserError, match="no slots for task 'spine'.*abd"):
        run("remove", stage, "spine")
    with pytest.raises(UserError, match="would leave no slots"):
        run("remove", stage, "abd", "chest", "head")


def test_rename_changes_no_number(run, stage, tmp_path):
    run("rename", stage, "abd", "abdomen", "--output", tmp_path / "n.pth")
    before, after = read_place(stage), read_place(tmp_path / "n.pth")
    assert [task.name for task in after.tasks] == ["abdomen", "chest", "head"]
    assert [task.checksum() for task in after.tasks] == [task.checksum() for task in before.tasks]
    with pytest.raises(UserError, match="already"):
        run("rename", stage, "abd", "head")
    with pytest.raises(UserError, match="lower-case"):
        run("rename", stage, "abd", "A B")


def test_verify_passes_a_sound_file_and_names_what_is_wrong(run, stage, base, tmp_path, capsys):
    run("verify", stage, "--model-base", base)
    shown = capsys.readouterr().out
    assert "BAD" not in shown and f"{base} is" in shown
    data = torch.load(stage / "slots.pth", weights_only=True)
    data["offsets"]["chest"]["A"]["o_proj"][0, 0, 0, 0] += 1
    torch.save(data, tmp_path / "bent.pth")
    with pytest.raises(UserError, match=r"bent\.pth: is damaged"):
        run("verify", tmp_path / "bent.pth")
    other = write_base(tmp_path / "llava-other-base", seed=3)
    with pytest.raises(UserError, match="not sound: base"):
        run("verify", stage, "--model-base", other)


def test_verify_names_infinite_numbers(run, stage, tmp_path):
    slots = read_place(stage)
    slots.task("head").B["o_proj"][1, 0, 0, 0] = torch.inf
    slots.write(tmp_path / "inf.pth")
    with pytest.raises(UserError, match="task 'head' holds NaN or infinite"):
        run("verify", tmp_path / "inf.pth")


@pytest.mark.parametrize("weights", [None, [0.5, 0.0, -0.25, 2.0]])
def test_exported_adapter_gives_the_logits_of_the_fixed_mixture(run, stage, base, tmp_path, weights):
    from peft import PeftModel

    slots = read_place(stage)
    slots.task("chest").info["mixture"] = [0.1, 0.5, 0.1, 0.3]
    slots.write(stage / "slots.pth")
    flags = [] if weights is None else ["--weights", *weights]
    run("export-peft", stage, "chest", "--output", tmp_path / "lora", *flags)
    mixture = fixed_mixture(slots, slots.task("chest"), weights)
    if weights is None:
        assert mixture == pytest.approx({1: 0.625, 3: 0.375})  # top_k is 2

    _, routed, _, _ = load_pretrained_model(str(stage), str(base), device="cpu")
    _, plain, _, _ = load_pretrained_model(str(base), None, device="cpu")
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids[:, 3] = -200
    with torch.no_grad():
        start = routed.retriever.pool.slot_range("chest").start
        wanted = routed(
            ids,
            images=pixels,
            slot_indices=torch.tensor([[start + slot for slot in mixture]] * 2),
            slot_weights=torch.tensor([list(mixture.values())] * 2),
        ).logits
        without = plain(ids, images=pixels).logits
        found = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(input_ids=ids, images=pixels).logits
    assert (found - wanted).abs().max() <= 1e-4
    assert (without - wanted).abs().max() > 1e-2


def test_export_adapts_the_decoder_and_not_the_vision_tower(stage, base, tmp_path):
    from peft import PeftModel

    slots = read_place(stage)
    slots.settings.features = {"q_proj": (HIDDEN, HIDDEN)}  # the vision tower has q_proj too
    for task in slots.tasks:
        for offsets in (task.A, task.B):
            offsets["q_proj"] = offsets.pop("o_proj")
    export_peft(slots, "abd", tmp_path / "lora")
    _, plain, _, _ = load_pretrained_model(str(base), None, device="cpu")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "lora")
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) == 2 * LAYERS and not [name for name in names if "vision" in name]


def test_export_refuses_bad_weights_and_untrained_tasks(stage):
    slots = read_place(stage)
    with pytest.raises(UserError, match="3 weights given, but task 'abd' has 4 slots"):
        fixed_mixture(slots, slots.task("abd"), [1, 2, 3])
    with pytest.raises(UserError, match="all weights are 0"):
        fixed_mixture(slots, slots.task("abd"), [0, 0, 0, 0])
    slots.task("abd").trained = False
    with pytest.raises(UserError, match="not trained yet"):
        export_peft(slots, "abd", "unused")


def prototype_state(rank=2, pool=2 * SLOTS):
    generator = torch.Generator().manual_seed(3)
    components = torch.randn(pool, 2, LAYERS * rank * HIDDEN, generator=generator)
    components[SLOTS:, 0] = 0  # the second task was never trained
    return {
        "retriever.keys": torch.randn(1, GROUPS, pool, HIDDEN // GROUPS, generator=generator),
        "retriever.weight_offset_components": components,
        "retriever.current_weight": torch.zeros(3),
    }


def import_args(source, base, *more):
    tasks = ["--tasks", "abd", "chest", "--slots_per_task", SLOTS, "--text_encoder", "base"]
    return ["import-prototype", source, *tasks, "--model-base", base, *more]


def test_prototype_slots_add_what_the_prototype_adds(run, base, tmp_path):
    state = prototype_state()
    torch.save(state, tmp_path / "retriever.bin")
    run(*import_args(tmp_path / "retriever.bin", base, "--output", tmp_path / "old.pth"))
    slots = Pool.read(tmp_path / "old.pth")
    assert [(task.name, task.trained) for task in slots.tasks] == [("abd", True), ("chest", False)]
    assert (slots.settings.weighting, slots.settings.router, slots.settings.rank) == ("distance", "keys", 2)
    assert torch.equal(slots.task("chest").text_keys, state["retriever.keys"][0, :, SLOTS:])
    a, b = state["retriever.weight_offset_components"][1].unflatten(1, (LAYERS, -1, HIDDEN))  # each [layers, r, hidden]
    mine = slots.task("abd")
    for layer in range(LAYERS):
        dense = torch.einsum("rh,rg->hg", a[layer], b[layer])  # the prototype's offset of o_proj.weight
        found = mine.A["o_proj"][1, layer].T @ mine.B["o_proj"][1, layer]
        assert torch.allclose(found, dense, atol=1e-5)


def test_prototype_slots_route_and_answer_in_a_stage_folder(run, base, tmp_path):
    torch.save(prototype_state(), tmp_path / "retriever.bin")
    stage = tmp_path / "llava-old"
    stage.mkdir()
    run(*import_args(tmp_path / "retriever.bin", base, "--output", stage / "slots.pth", "--top_k", "2"))
    tokenizer, model, _, _ = load_pretrained_model(str(stage), str(base), device="cpu")
    ids = torch.tensor([tokenizer("is there a lesion").input_ids])
    model.generate(ids, questions=["is there a lesion"], max_new_tokens=2, do_sample=False)
    assert model.last_route.tasks == ["abd"]
    assert model.last_route.slot_weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_bare_prototype_key_file_gives_untrained_slots(run, base, tmp_path):
    torch.save({"keys": prototype_state()["retriever.keys"]}, tmp_path / "keys.pth")
    run(*import_args(tmp_path / "keys.pth", base, "--output", tmp_path / "old.pth"))
    assert not any(task.trained or task.A for task in Pool.read(tmp_path / "old.pth").tasks)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("retriever.keys"), "expected 'retriever.keys'"),
        (lambda s: s.update({"retriever.keys": s["retriever.keys"][0]}), "expected 'retriever.keys'"),
        (lambda s: s["retriever.keys"].fill_(torch.nan), "NaN or infinite"),
        (lambda s: s.update({"retriever.keys": s["retriever.keys"][:, :, :3]}), "holds 3 slots, but task 'abd'"),
        (
            lambda s: s.update({"retriever.weight_offset_components": torch.zeros(2 * SLOTS, 2, 33)}),
            "has shape .* must be",
        ),
    ],
)
def test_a_broken_prototype_checkpoint_is_refused_by_name(run, base, tmp_path, change, message):
    state = prototype_state()
    change(state)
    torch.save(state, tmp_path / "retriever.bin")
    with pytest.raises(UserError, match=message):
        run(*import_args(tmp_path / "retriever.bin", base, "--output", tmp_path / "old.pth"))


def test_a_missing_place_is_named(run, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        run("list", tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match=r"no slots\.pth in this folder"):
        run("verify", tmp_path)
