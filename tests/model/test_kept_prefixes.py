"""Prefixes on the disk: worked out once for all processes, with the same bits, and never under another's name."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_question_scope import GREEDY, NAMES, batch_of, make_model
from tiny_world import fit, merge, run_main, write_sequence

from llava.eval import evaluate_sequence, text_metrics
from llava.model import kept_prefixes
from llava.model.kept_prefixes import PrefixFolder, name_of, weights_of
from llava.model.prefixes import PrefixStore, SharedPrefixes

ROWS = ("one", "longer", "two", "none")


@pytest.fixture
def worked_out(monkeypatch):
    """Heads of the prefixes that were worked out."""
    found, work_out = [], SharedPrefixes._prefix
    monkeypatch.setattr(SharedPrefixes, "_prefix", lambda *words: found.append(words[1]) or work_out(*words))
    return found


def answers(folder=None, limit=2**20, model=None):
    """What a model of its own answers, as a process of its own would: its store is new."""
    model = model or make_model()
    model.retriever.pool.finish_training()
    model.prefixes = PrefixStore(limit, folder and PrefixFolder(folder, {"base": "tiny"}))
    batch = {**batch_of(*ROWS, side="left"), "picture_names": [NAMES[name] for name in ROWS]}
    scores = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    return torch.stack(scores.logits), model.prefixes


def test_another_process_finds_them_with_the_same_bits(tmp_path, worked_out):
    expected, _ = answers()
    assert len(worked_out) == 3
    for calls in (3, 0, 0):
        worked_out.clear()
        found, store = answers(tmp_path, limit=0)  # what lies on the disk takes none of the memory
        assert torch.equal(found, expected) and len(worked_out) == calls and (store.used, store.full) == (0, False)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"damaged")
    found, _ = answers(tmp_path)
    assert torch.equal(found, expected) and len(worked_out) == 1


def test_where_the_disk_has_no_room_the_memory_keeps_them(tmp_path, worked_out, monkeypatch):
    expected, _ = answers()
    monkeypatch.setattr(kept_prefixes.SightStore, "_has_room", lambda self, more: False)
    found, store = answers(tmp_path)
    assert torch.equal(found, expected) and store.used > 0 and len(store) == 3


@pytest.mark.parametrize("change", ["decoder", "projector", "dtype", "attention", "models"])
def test_other_weights_and_arithmetic_have_other_folders(change):
    model, models = make_model(), {"base": "tiny"}
    before = weights_of(model, models)
    assert before == weights_of(make_model(), models)
    with torch.no_grad():
        if change == "decoder":
            model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
        elif change == "projector":
            model.model.mm_projector.weight[-1, -1] += 1e-3
        elif change == "dtype":
            model.float()
        elif change == "attention":
            model.config._attn_implementation = "eager"
        else:
            models = {"base": "tiny", "over": "whole"}
    assert weights_of(model, models) != before


def test_other_ids_pictures_and_ways_of_putting_them_together_have_other_files(monkeypatch):
    model, picture = make_model(), torch.randn(1, 4, 8)
    names = [name_of(model, [1, 2], [picture], [(8, 8)]), name_of(model, [1, 3], [picture], [(8, 8)])]
    names += [name_of(model, [1, 2], [picture + 1], [(8, 8)]), name_of(model, [1, 2], [picture.half()], [(8, 8)])]
    names += [name_of(model, [1, 2], [picture.reshape(4, 1, 8)], [(8, 8)]), name_of(model, [1, 2], [picture], [None])]
    names += [name_of(model, [1, 2], [picture, picture], [(8, 8), (8, 8)])]
    model.config.mm_patch_merge_type = "spatial"
    names += [name_of(model, [1, 2], [picture], [(8, 8)])]
    with torch.autocast("cpu", torch.bfloat16):
        names += [name_of(model, [1, 2], [picture], [(8, 8)])]
    assert len(set(names)) == len(names) and all(len(name) == 64 for name in names)


@pytest.mark.slow
def test_a_second_training_and_a_second_evaluation_work_out_none(world, tmp_path, worked_out, monkeypatch):
    monkeypatch.setattr(text_metrics, "find_java", lambda: None)
    sequence = write_sequence(tmp_path, ("abd",))
    values = json.loads(sequence.read_text())
    sequence.write_text(json.dumps({**values, "keys": {"offset_scope": "question"}, "metrics": ["exact_match"]}))
    fit(tmp_path, world.base, sequence, "abd", "--offset_scope", "question")
    keys = merge(tmp_path, sequence)

    def run(name, cache):
        """Positions that a training and an evaluation of it worked out, and what both ended with."""
        out, counted = tmp_path / name, []
        words = ["--sequence", sequence, "--retriever_state_dict", keys, "--query_cache", cache]
        worked_out.clear()
        world.train("abd", out / "llava-tiny_abd", None, *words)
        counted.append(len(worked_out))
        worked_out.clear()
        words = ["--sequence", sequence, "--base_model", world.base, "--output_dir", out, "--query_cache", cache]
        run_main(lambda: evaluate_sequence.main(), *words, "--max_new_tokens", "3")
        counted.append(len(worked_out))
        texts = [path.read_text() for path in sorted(out.rglob("answers.jsonl"))]
        return counted, ((out / "llava-tiny_abd" / "slots.pth").read_bytes(), texts)

    (trained, asked), expected = run("none", "")
    assert trained > 0 and asked > 0 and len(expected[1]) == 2
    counted, found = run("first", tmp_path / "cache")
    assert counted[0] == trained and counted[1] < asked and found == expected  # training left some of them
    counted, found = run("second", tmp_path / "cache")
    assert counted == [0, 0] and found == expected
