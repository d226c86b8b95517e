"""Offsets that act behind the picture alone: everything up to its end is the frozen base's, however it is asked."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny_llava import FAMILIES
from tiny_question_scope import GREEDY, HEAD, NAMES, PICTURE, ROWS, batch_of, head_length, make_model, spliced_length

from llava.data.samples import DataCollatorForSupervisedDataset
from llava.model import prefixes
from llava.model.prefixes import PrefixStore
from llava.slots.settings import RetrieverSettings
from llava.train.stage_data import share_prefixes


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request):
    return make_model(family=request.param)


def close(found, expected, atol=1e-9, rtol=1e-9):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("side", ["right", "left"])
def test_all_up_to_the_picture_is_the_bases_bit_for_bit(model, side):
    """Hidden states, keys and values; behind it the offsets act, and in a row without picture everywhere."""
    model.config.tokenizer_padding_side = side
    names = tuple(ROWS)
    batch = batch_of(*names, side=side)
    asked = {"output_hidden_states": True, "use_cache": True}
    found, base = model(**batch, **asked), model(**batch, **asked, route="none")
    lengths = [spliced_length(name) for name in names]
    for row, name in enumerate(names):
        first = max(lengths) - lengths[row] if side == "left" else 0
        before, behind = slice(first, first + head_length(name)), first + head_length(name)
        for mine, theirs in zip(found.hidden_states, base.hidden_states, strict=True):
            assert torch.equal(mine[row, before], theirs[row, before])
        for mine, theirs in zip(found.past_key_values.layers, base.past_key_values.layers, strict=True):
            assert torch.equal(mine.keys[row, :, before], theirs.keys[row, :, before])
            assert torch.equal(mine.values[row, :, before], theirs.values[row, :, before])
        assert not torch.allclose(found.logits[row, behind], base.logits[row, behind])
    model.config.tokenizer_padding_side = "right"


def test_behind_the_picture_the_offsets_are_those_of_scope_all():
    """The question over the base's keys and values: the same as decoding it, offsets on, behind the base's prefill."""
    scoped, whole = make_model("question"), make_model("all")
    batch = batch_of("one")
    expected = scoped(**batch).logits
    head = {**batch, "input_ids": batch["input_ids"][:, :4], "attention_mask": batch["attention_mask"][:, :4]}
    cache = whole(**head, route="none", use_cache=True).past_key_values
    route = whole.route(batch["text_query"], None)
    close(
        whole(batch["input_ids"][:, 4:], past_key_values=cache, route=route).logits, expected[:, head_length("one") :]
    )
    assert not torch.allclose(whole(**batch).logits, expected)
    words = batch_of("none")
    close(scoped(**words).logits, whole(**words).logits)


def test_rows_are_the_same_in_any_batch(model):
    names = tuple(ROWS)
    whole = batch_of(*names)
    logits = model(**whole).logits
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in whole.items()}
        width = len(ROWS[name])
        alone |= {key: alone[key][:, :width] for key in ("input_ids", "attention_mask")}
        close(model(**alone).logits[0], logits[row, : spliced_length(name)])


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_the_whole_prompt_at_every_step(model, beams):
    """``generate`` pads on the left and keeps a cache; without one every step works the whole prompt out again."""
    batch = batch_of("one", "two", "none", side="left")
    options = {**GREEDY, "num_beams": beams}
    found = model.generate(**batch, **options)
    assert torch.equal(found, model.generate(**batch, **options, use_cache=False))
    assert not torch.equal(found, make_model("all", type(model).__name__[5:-11].lower()).generate(**batch, **options))
    alone = {
        key: value[:1, -7:] if key != "images" and key != "text_query" else value[:1] for key, value in batch.items()
    }
    assert torch.equal(model.generate(**alone, **options), found[:1])


def test_prepared_embeddings_keep_their_scope(model):
    """However they are padded; others are refused unless the route says where the pictures end."""
    batch = batch_of("one", "two", "none")
    expected = model(**batch).logits
    args = (batch["input_ids"], None, batch["attention_mask"], None, None, batch["images"])
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(*args, text_query=batch["text_query"])
    route = model.last_route
    expected, real = expected[mask.bool()], mask.bool()
    close(model(inputs_embeds=embeds, attention_mask=mask).logits[real], expected)
    hidden = model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    close(model.lm_head(hidden)[real], expected)
    wider = torch.nn.functional.pad(embeds, (0, 0, 3, 0))
    seen = torch.nn.functional.pad(mask, (3, 0))
    found = model(inputs_embeds=wider, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)).logits
    close(found[:, 3:][real], expected)
    noisy = embeds + 1e-3
    found = model(inputs_embeds=noisy, attention_mask=mask, route=route).logits[0]
    base = model(inputs_embeds=noisy, attention_mask=mask, route="none").logits[0]
    end = head_length("one")
    assert torch.equal(found[:end], base[:end]) and not torch.allclose(found[end], base[end])
    with pytest.raises(ValueError, match="behind the last picture.*starts="):
        model(inputs_embeds=noisy, attention_mask=mask, route=dataclasses.replace(route, starts=None))


def test_settings_of_older_files_mean_all_and_unknown_words_are_refused():
    values = make_model().retriever.settings.to_dict()
    assert values["offset_scope"] == "question"
    del values["offset_scope"]
    assert RetrieverSettings.from_dict(values).offset_scope == "all"
    with pytest.raises(ValueError, match="offset_scope"):
        RetrieverSettings.from_dict({**values, "offset_scope": "picture"})


# -- prefixes that are kept --------------------------------------------------------------------------------------------


def training(model, *names, store=None, **more):
    """Loss and gradients of a batch; with a store, by way of the prefixes that it keeps."""
    model.prefixes = store
    model.train()
    parameters = model.retriever.train_only("abd")
    for parameter in parameters:
        parameter.grad = None
    told = {"picture_names": [NAMES[name] for name in names]}
    out = model(**batch_of(*names, labels=True), **told, **more)
    loss = out.loss if more.get("answers_only") else exact_loss(out.logits, names, model.prefixes is not None)
    loss.backward()
    model.prefixes = None
    model.eval()
    return out.loss.item(), loss, [parameter.grad.clone() for parameter in parameters]


def exact_loss(logits, names, behind):
    """The mean loss of the rows' last two words in float64, which the model's own is not."""
    picked = []
    for row, name in enumerate(names):
        end = spliced_length(name) - (head_length(name) if behind and logits.shape[1] < 12 else 0)
        picked.append(logits[row, end - 3 : end - 1])
    wanted = torch.tensor([word for name in names for word in ROWS[name][-2:]])
    return torch.nn.functional.cross_entropy(torch.cat(picked), wanted)


@pytest.fixture
def passes(model):
    """How many positions each pass of the decoder ran."""
    ran = []

    def note(module, args, kwargs):
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        ran.append(tuple(given.shape[:2]))

    watch = model.model.register_forward_pre_hook(note, with_kwargs=True)
    yield ran
    watch.remove()
    model.retriever.pool.finish_training()


@pytest.mark.parametrize("answers_only", [True, False])
def test_a_step_behind_kept_prefixes_has_the_same_loss_and_gradients(model, passes, answers_only):
    """Prefixes of several lengths and none, met for the first time and again."""
    names = ("one", "longer", "two", "none", "one")
    told, exact, expected = training(model, *names, answers_only=answers_only)
    store = PrefixStore(2**20)
    limits = {"atol": 1e-5, "rtol": 1e-5} if answers_only else {}  # logits are float32 there
    for again in (False, True):
        passes.clear()
        loss, mine, gradients = training(model, *names, store=store, answers_only=answers_only)
        assert loss == pytest.approx(told, rel=1e-5)
        close(mine, exact, **limits)
        close(gradients, expected, **limits)
        behind = max(spliced_length(name) - head_length(name) for name in names)
        heads = [] if again else [(1, head_length(name)) for name in names[:3]]
        assert passes == [*heads, (len(names), behind)]
    assert len(store) == 3 and store.used == sum(store.get(key).nbytes for key in store._kept)


def test_a_store_without_room_keeps_nothing_and_changes_nothing(model, passes):
    _, exact, expected = training(model, "one", "two")
    store = PrefixStore(100)
    _, mine, gradients = training(model, "one", "two", store=store)
    close(mine, exact)
    close(gradients, expected)
    assert store.full and not len(store) and store.used == 0


@pytest.mark.parametrize(
    "why", ["checkpointing", "dropout", "base trains", "scope all", "labels before", "window", "hidden states"]
)
def test_where_prefixes_cannot_be_shared_all_positions_run(passes, model, why, monkeypatch):
    asked, names = {}, ("one", "longer")
    if why == "checkpointing":
        monkeypatch.setattr(model.model.layers[0], "gradient_checkpointing", True)
        monkeypatch.setattr(
            model.model.layers[0], "_gradient_checkpointing_func", lambda call, *args: call(*args), False
        )
    elif why == "dropout":
        monkeypatch.setattr(model.config, "attention_dropout", 0.5)
    elif why == "base trains":
        monkeypatch.setattr(model.model.norm.weight, "requires_grad", True)
    elif why == "scope all":
        monkeypatch.setattr(model.retriever.settings, "offset_scope", "all")
    elif why == "labels before":
        monkeypatch.setitem(ROWS, "one", HEAD + PICTURE + [9])
    elif why == "window":
        monkeypatch.setattr(model.config, "tokenizer_model_max_length", 12, raising=False)
    else:
        asked["output_hidden_states"] = True
    training(model, *names, store=PrefixStore(2**20), answers_only=True, **asked)
    assert passes[-1][1] >= min(12, max(map(spliced_length, names)))


@pytest.mark.parametrize("route", [None, "none"])
def test_answers_behind_kept_prefixes_are_the_same(model, passes, route):
    """Of a stage and of the base, whose prefixes are the same; with several beams the whole prompts run."""
    model.retriever.pool.finish_training()
    names = ("one", "none", "longer", "two", "one")
    batch = {**batch_of(*names, side="left"), "picture_names": [NAMES[name] for name in names], "route": route}
    expected = model.generate(**batch, **GREEDY)
    passes.clear()
    try:
        model.prefixes = PrefixStore(2**20)
        for again in (False, True):
            assert torch.equal(model.generate(**batch, **GREEDY), expected)
            heads = [] if again else [(1, head_length(name)) for name in ("one", "longer", "two")]
            assert passes[: len(heads) + 1] == [*heads, (5, 6)]
            passes.clear()
        other = {**batch, "route": "none" if route is None else None}
        model.generate(**other, **GREEDY)
        assert passes[0] == (5, 6)
        beams = {**GREEDY, "num_beams": 2}
        shared = model.generate(**batch, **beams)
        model.prefixes = PrefixStore(0)
        assert torch.equal(model.generate(**batch, **beams), shared)
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
        passes.clear()
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
        assert passes[0] == (5, max(map(spliced_length, names)))  # nothing is worked out that finds no room
    finally:
        del model.prefixes


def test_half_precision_runs():
    half = make_model().float()
    half.prefixes, half.config.use_cache = PrefixStore(2**20), False
    half.train()
    half.retriever.train_only("abd")
    batch = batch_of("one", "two", labels=True)
    batch |= {"images": [[picture.float() for picture in row] for row in batch["images"]]}
    batch["text_query"] = batch["text_query"].float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = half(**batch, picture_names=[NAMES["one"], NAMES["two"]], answers_only=True).loss
    loss.backward()
    assert torch.isfinite(loss)
    (kept, *_) = half.prefixes._kept.values()
    assert kept.dtype == torch.bfloat16


def test_prefixes_go_to_a_gpu_without_pinned_memory(monkeypatch):
    """Torch keeps what was once pinned: 16 prefixes of a 7B would be 8 GB beside those that are kept."""
    pinned, prefix = [], torch.randn(2, 2, 1, 5, 3)
    monkeypatch.setattr(prefixes, "moved", lambda tensor, device: pinned.append(tensor.nbytes) or tensor.to(device))
    cached, seen = prefixes.joined([prefix, prefix[:, :, :, :3]], torch.device("cpu"))
    assert pinned == [seen.nbytes] and seen.tolist() == [[True] * 5, [False] * 2 + [True] * 3]
    assert torch.equal(cached[:, :, 0], prefix) and torch.equal(cached[:, :, 1, :, 2:], prefix[:, :, :, :3])


def test_a_stage_keeps_prefixes_in_the_memory_that_features_leave():
    settings = make_model().retriever.settings
    features = {"a.png": (torch.zeros(1, 4, 2**18), (8, 8))}  # 4 MiB
    data = SimpleNamespace(features=features, named=False)
    model, args = SimpleNamespace(), SimpleNamespace(feature_cache_mb=5, query_cache="")
    share_prefixes(model, None, [data], settings, args)
    assert data.named and model.prefixes.limit == 2**20 and model.prefixes.folder is None
    model, data.named = SimpleNamespace(), False
    share_prefixes(model, None, [data], dataclasses.replace(settings, offset_scope="all"), args)
    assert not data.named and not hasattr(model, "prefixes")


def test_batches_name_their_pictures():
    samples = [
        {"input_ids": torch.tensor(ROWS[name]), "labels": torch.tensor(ROWS[name]), "picture_names": NAMES[name]}
        for name in ("two", "none")
    ]
    batch = DataCollatorForSupervisedDataset(SimpleNamespace(pad_token_id=0))(samples)
    assert batch["picture_names"] == [("a.png", "b.png"), ()]
