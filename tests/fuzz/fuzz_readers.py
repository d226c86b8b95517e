"""Coverage-guided fuzzing of everything that reads a file from outside.

    pip install atheris
    python tests/fuzz/fuzz_readers.py --seconds 300 [--reader rows] [--corpus FOLDER]

Each reader gets what libFuzzer makes of a few whole files. It must read it or refuse it with one line (``UserError``);
any other error is a finding: told once for each place in the code, its input kept in the corpus folder's ``findings``.
More than ten seconds or 4 GiB for one input ends the run, which says so. Status 1 where anything was found.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ROW = {"question_id": 1, "image": "a.png", "text": "<image>\nWhat?", "gpt4_answer": "yes", "domain": {"abd": True}}
INSTRUCT = {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "What?"}]}
FOREIGN = {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What?"}]}
ANSWER = {"question_id": 1, "prompt": "What?", "text": "yes", "answer_id": "a", "model_id": "b", "metadata": {}}
FIGURE = {"n": 1, "formula": "a", "value": 1.0, "ci95": [0.0, 1.0]}
PROVENANCE = {name: {"path": "a", "sha256": "0"} for name in ("question_file", "answers_file")}
PROVENANCE |= {"package": {}, "tokenizer": "plain", "unanswered_questions": 0}
SCORES = {"groups": {"all": {"rows": 1, "figures": {"exact_match": FIGURE}}}, "model_id": "a", "rows_file": "r.jsonl"}
SCORES |= {"provenance": PROVENANCE}
SEQUENCE = {"name": "a", "tasks": [{"name": "abd", "train": "a.jsonl"}], "test": "t.jsonl", "image_folder": "."}
VISION = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
CONFIG = {"model_type": "llava_llama", "hidden_size": 32, "num_attention_heads": 2, "vision_config": VISION}
REFERENCE = {"qid": 1, "image_name": "a.jpg", "image_organ": "HEAD", "question": "What?", "answer": "yes"}
SLAKE = {"qid": 1, "img_name": "a.jpg", "question": "What?", "answer": "yes", "modality": "CT", "answer_type": "CLOSED"}
VQA_RAD = {**REFERENCE, "phrase_type": "freeform", "question_type": "PRES", "answer_type": "CLOSED"}
CURVE = {"matrix": [[0.5]], "learning_curve": {"value": [0.5]}, "summary": {"bwt": {"value": 0.5}}}
MATRIX = {"tasks": ["abd"], "metrics": {"exact_match": CURVE}, "provenance": {"question_file": {"sha256": "0"}}}
MMBENCH = b"index\tquestion\thint\tA\tB\tcategory\timage\n1\tWhat?\tnan\tyes\tno\ta\tAAAA\n"
ZERO = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "train_micro_batch_size_per_gpu": "auto"}
INDEX_FILE = "model.safetensors.index.json"
SETTINGS = [f"{name}.json" for name in ("config", "tokenizer_config", "special_tokens_map", "added_tokens")]
SETTINGS += [f"{name}_config.json" for name in ("preprocessor", "processor", "generation", "adapter")] + [INDEX_FILE]
SLOTS = {"format": "", "version": 1, "settings": {"num_layers": 2, "groups": 4}, "tasks": [{"name": "abd"}]}


def readers() -> dict[str, tuple[str, Callable[[Path], object]]]:
    """By name the name of the file that is read, and what reads it."""
    import torch

    from llava.checkpoints.card import licence_fields
    from llava.checkpoints.manifest import check_seal
    from llava.checkpoints.schemas import FILES, read_settings
    from llava.checkpoints.weights import load_bin, tensor_names
    from llava.continual.prototype_config import read_prototype_config
    from llava.continual.query_cache import QueryCache
    from llava.continual.record import read_record
    from llava.continual.sequence import load_sequence
    from llava.data.answers import read_answers
    from llava.data.raw.example import Report
    from llava.data.raw.metadata_csv import read_metadata
    from llava.data.raw.references import read_references
    from llava.data.raw.slake import SPLIT_FILES, read_slake
    from llava.data.raw.vqa_rad import read_vqa_rad
    from llava.data.rows import read_rows
    from llava.eval.model_vqa_mmbench import question_rows
    from llava.eval.over_seeds import over_seeds, read_matrix
    from llava.eval.score_schema import read_scores
    from llava.image_io import load_image
    from llava.mm_utils import load_image_from_base64
    from llava.model.vision.sights import Sight, SightStore
    from llava.normal_form import normalise
    from llava.outside import parsed_yaml, read_text
    from llava.slots.adapter import read_memory
    from llava.slots.file import FORMAT, read_slot_data

    def schema_of_slots(file: Path) -> object:
        try:
            values = json.loads(file.read_bytes())
            if not isinstance(values, dict):
                return None
            torch.save({**values, "format": FORMAT}, file)
        except (ValueError, RecursionError):
            return None
        return read_slot_data(file)

    def split_of_slake(file: Path) -> None:
        for name in SPLIT_FILES.values():
            if name != file.name:
                shutil.copyfile(file, file.with_name(name))
        read_slake(file.parent, Report("fuzz"))

    def cached_queries(file: Path) -> None:
        cache = QueryCache(file.parent)
        cache.write("queries", {}, [1.0])
        (kept,) = file.parent.glob("queries-*.pt")
        kept.write_bytes(file.read_bytes())
        assert cache.read("queries", {}) is None, "a foreign cache is taken for its own"

    def kept_sight(file: Path) -> None:
        store = SightStore(file.parent, "a" * 32)
        store.put("0" * 64, Sight(torch.zeros(1, 1, 1), {}, (1, 1)))
        (kept,) = store.folder.glob("*.safetensors")
        kept.unlink()
        kept.write_bytes(file.read_bytes())
        assert store.get("0" * 64) is None, "a foreign sight is taken for its own"

    def deepspeed_settings(file: Path) -> None:
        from llava.train.deepspeed_config import check_deepspeed_config  # DeepSpeed takes its time

        check_deepspeed_config(file)

    def normal_form(file: Path) -> None:
        once = normalise(read_text(file))
        assert normalise(once) == once, "normalising twice gives another text"

    found: dict[str, tuple[str, Callable[[Path], object]]] = {
        "rows": ("rows.jsonl", read_rows),
        "answers": ("answers.jsonl", read_answers),
        "table": ("metadata.csv", lambda file: read_metadata(file, Report("fuzz"))),
        "references": ("organs.json", lambda file: read_references([file], Report("fuzz"))),
        "vqa-rad": ("vqa_rad.json", lambda file: read_vqa_rad(file, Report("fuzz"))),
        "slake": ("train.json", split_of_slake),
        "mmbench": ("mmbench.tsv", lambda file: list(question_rows(str(file), file.parent, True))),
        "sequence": ("sequence.json", load_sequence),
        "prototype-settings": ("prototype.json", lambda file: read_prototype_config(str(file))),
        "deepspeed": ("zero.json", deepspeed_settings),
        "scores": ("scores.json", read_scores),
        "matrix": ("accuracy_matrix.json", lambda file: over_seeds([read_matrix(file.parent)])),
        "record": ("training.json", read_record),
        "seal": ("checksums.json", lambda file: check_seal(file.parent)),
        "queries": ("queries.pt", cached_queries),
        "sight": ("sight.bin", kept_sight),
        "memory": ("memory.pth", lambda file: read_memory(file.parent)),
        "weights": ("model.safetensors", tensor_names),
        "torch-weights": ("pytorch_model.bin", load_bin),
        "slots": ("slots.pth", read_slot_data),
        "slots-schema": ("slots.pth", schema_of_slots),
        "picture": ("picture.png", load_image),
        "dicom": ("picture.dcm", load_image),
        "base64": ("picture.txt", lambda file: load_image_from_base64(file.read_bytes())),
        "yaml": ("card.yaml", lambda file: parsed_yaml(read_text(file), str(file))),
        "card": ("README.md", lambda file: licence_fields(file.parent)),
        "text": ("text.txt", normal_form),
    }
    assert set(SETTINGS) == {*FILES, INDEX_FILE}
    return found | {name: (name, read_settings) for name in SETTINGS}


def seeds() -> Iterator[tuple[str, bytes]]:
    """A reader's name and the bytes of a whole file that it reads."""
    from llava.checkpoints.manifest import content_of

    for row in (ROW, INSTRUCT, FOREIGN):
        yield "rows", json.dumps(row).encode() + b"\n" + json.dumps(row).encode()
    yield "answers", json.dumps(ANSWER).encode() + b"\n"
    yield "table", b"file_name,question,answer\na.png,What?,yes\n"
    keys = {"rank": 2, "targets": ["o_proj"], "iterations": 5}
    more = {"slots_per_task": 4, "metrics": ["exact_match"], "keys": keys, "train": {"epochs": 1, "zero": "none"}}
    yield "sequence", json.dumps({**SEQUENCE, **more}).encode()
    for name, value in (("references", REFERENCE), ("slake", SLAKE), ("vqa-rad", VQA_RAD)):
        yield name, json.dumps([value]).encode()
    yield "mmbench", MMBENCH
    yield "prototype-settings", b'{"weight_topk": 4, "low_rank": 8, "groups": 4, "seed": 1}'
    yield "deepspeed", json.dumps(ZERO).encode()
    yield "matrix", json.dumps(MATRIX).encode()
    yield "seal", json.dumps({"files": {}, "checksum": content_of({})}).encode()
    yield "scores", json.dumps(SCORES).encode()
    yield "record", json.dumps({"task": "abd", "method": "slots", "settings": {"epochs": 1}}).encode()
    yield "slots-schema", json.dumps(SLOTS).encode()
    yield "yaml", b"license: mit\ntags: [a, b]\n"
    yield "card", b"---\nlicense: mit\nlicense_name: [a, b]\n---\n# A card\n"
    yield "base64", base64.b64encode(next(_pictures()))
    yield "text", "HER2+, <5 mm, -5, 1/2, 5.0, ü".encode()
    for name in SETTINGS:
        yield name, json.dumps(CONFIG).encode()
    yield "slots", _whole_slots()
    for name in ("queries", "memory", "torch-weights"):
        yield name, _tensors()
    for name in ("weights", "sight"):
        yield name, _safetensors()
    yield from (("picture", data) for data in _pictures())
    yield "dicom", _dicom()


def _whole_slots() -> bytes:
    """A slot file of one task, as it is written."""
    import torch

    from llava.slots.pool import Pool
    from llava.slots.settings import RetrieverSettings
    from llava.slots.task_slots import TaskSlots

    settings = RetrieverSettings(1, {"o_proj": (2, 2)}, 2, 2, groups=1, rank=1, top_k=1)
    sides = ({"o_proj": torch.ones(1, 1, 1, 2)} for _ in "AB")
    keys = (torch.ones(1, 1, 2) for _ in range(2))
    task = TaskSlots("abd", 0, 1, *keys, trained=True, **dict(zip("AB", sides)))
    with tempfile.TemporaryDirectory() as folder:
        Pool(settings, [task], {"path": "base", "fingerprint": "0"}).write(Path(folder) / "slots.pth")
        return (Path(folder) / "slots.pth").read_bytes()


def _tensors() -> bytes:
    """Named tensors as torch keeps them."""
    import torch

    stream = io.BytesIO()
    torch.save({"keys": torch.zeros(2, 2), "mm_projector.bias": torch.zeros(2)}, stream)
    return stream.getvalue()


def _safetensors() -> bytes:
    head = json.dumps({"keys": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(16)


def _pictures() -> Iterator[bytes]:
    from PIL import Image

    for mode, kind in (("RGB", "PNG"), ("I;16", "PNG"), ("P", "GIF"), ("L", "JPEG"), ("CMYK", "TIFF"), ("1", "BMP")):
        stream = io.BytesIO()
        Image.new(mode, (5, 3)).save(stream, kind)
        yield stream.getvalue()


def _dicom() -> bytes:
    """A head and 2 x 2 pixels, explicit little endian, written by hand: pydicom is an extra."""

    def element(group: int, number: int, kind: str, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        size = len(value).to_bytes(4, "little")
        length = b"\0\0" + size if kind in ("OB", "OW") else size[:2]
        return group.to_bytes(2, "little") + number.to_bytes(2, "little") + kind.encode() + length + value

    head = element(2, 0x10, "UI", b"1.2.840.10008.1.2.1")
    body = element(0x28, 2, "US", b"\1\0") + element(0x28, 4, "CS", b"MONOCHROME2 ")
    for number, value in ((0x10, 2), (0x11, 2), (0x100, 16), (0x101, 16), (0x102, 15), (0x103, 0)):
        body += element(0x28, number, "US", value.to_bytes(2, "little"))
    body += element(0x28, 0x1050, "DS", b"40") + element(0x28, 0x1051, "DS", b"400")
    body += element(0x7FE0, 0x10, "OW", bytes(range(8)))
    return b"\0" * 128 + b"DICM" + element(2, 0, "UL", len(head).to_bytes(4, "little")) + head + body


class Target:
    """What is called with each input: its first byte chooses the reader, the rest is the file."""

    def __init__(self, folder: Path, findings: Path, only: str | None = None) -> None:
        found = readers()
        self.readers = {name: found[name] for name in found if only in (None, name)}
        self.folder, self.findings = folder, findings
        self.told: set[str] = set()
        (folder / "r.jsonl").write_text('{"scores": {"exact_match": 1.0}, "domain": "abd"}\n', encoding="utf-8")

    def input_of(self, name: str, data: bytes) -> bytes:
        """The input that gives a reader this file."""
        return bytes([[*self.readers].index(name)]) + data

    def __call__(self, data: bytes) -> None:
        from llava.utils import UserError

        if not data:
            return
        name = [*self.readers][data[0] % len(self.readers)]
        file, read = self.readers[name]
        path = self.folder / file
        path.write_bytes(data[1:])
        try:
            read(path)
        except UserError as error:
            if "\n" in str(error):
                self._tell(name, data, "a message of several lines", str(error))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in place if "/llava/" in frame.filename] or place
            where = f"{name}: {type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
            self._tell(name, data, where, "".join(traceback.format_exception(error)))

    def _tell(self, name: str, data: bytes, where: str, said: str) -> None:
        if where in self.told:
            return
        self.told.add(where)
        self.findings.mkdir(parents=True, exist_ok=True)
        kept = self.findings / f"{name}-{len(self.told)}"
        kept.write_bytes(data[1:])
        print(f"FOUND {where}\n{said}\nits input: {kept}", flush=True)


def main() -> int:
    """Fuzz in a child, which libFuzzer ends by itself; the exit status says whether anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300, help="how long")
    parser.add_argument("--reader", help="one alone; by default all in turn")
    parser.add_argument("--corpus", type=Path, default=Path("output/fuzz"), help="inputs that reached new code, kept")
    flags = parser.parse_args()
    findings = flags.corpus / "findings"
    before = set(findings.glob("*"))
    child = os.fork()
    if child == 0:
        fuzz(flags.seconds, flags.reader, flags.corpus)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    new = sorted(set(findings.glob("*")) - before)
    print(f"{len(new)} findings{''.join(f', {file}' for file in new)}; libFuzzer ended with {code}")
    return int(bool(new) or code != 0)


def fuzz(seconds: int, only: str | None, corpus: Path) -> None:
    """Run libFuzzer, which ends the process."""
    import torch  # noqa: F401  # first, and not instrumented: only the project's own code guides
    import atheris  # isort: skip

    with atheris.instrument_imports(include=["llava"]):
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        target = Target(folder, corpus / "findings", only)
    inputs = corpus / (only or "all")
    inputs.mkdir(parents=True, exist_ok=True)
    for number, (name, data) in enumerate(seeds()):
        if name in target.readers:
            target(target.input_of(name, data))  # what readers import at their first call counts for no input
            (inputs / f"seed-{number}").write_bytes(target.input_of(name, data))
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=4096"]
    words = [sys.argv[0], str(inputs), *limits, f"-artifact_prefix={corpus}/ended-by-"]
    atheris.Setup(words, target)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
