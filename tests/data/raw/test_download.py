"""The download script against a server on this machine: retries, checksums, broken zips, no connection."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import io
import json
import threading
import zipfile

import pytest
from raw_samples import ROOT, read_jsonl, vqa_rad_rows

import fusion
from llava.data.raw.download import Unreachable, fetch, pictures_sha256
from llava.utils import UserError

spec = importlib.util.spec_from_file_location("download_vqa_rad", ROOT / "scripts" / "download_vqa_rad.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

CONTENT = bytes(range(256)) * 1000


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; ``requests`` keeps the paths asked for; ``breaks`` ends that many answers half way."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks = 0
        self.failures: list[int] = []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        body = server.files.get(self.path.lstrip("/"))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    found = Server()
    found.files["file"] = CONTENT
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_plain_download(server, tmp_path):
    target = tmp_path / "folder" / "file"
    assert fetch(server.url("file"), target, sha256(CONTENT))
    assert target.read_bytes() == CONTENT
    assert not fetch(server.url("file"), target, sha256(CONTENT))  # it is there and right
    assert server.requests == ["/file"]
    assert list(target.parent.iterdir()) == [target]


def test_broken_connections_are_tried_again(server, tmp_path):
    server.breaks = 2
    fetch(server.url("file"), tmp_path / "file", sha256(CONTENT))
    assert len(server.requests) == 3
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_connection_that_always_breaks_leaves_nothing(server, tmp_path):
    server.breaks = 3
    with pytest.raises(Unreachable, match=rf"file: .*{len(CONTENT) // 2} bytes read"):
        fetch(server.url("file"), tmp_path / "file", None, attempts=3)
    assert list(tmp_path.iterdir()) == []
    fetch(server.url("file"), tmp_path / "file", sha256(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_checksum_keeps_nothing(server, tmp_path):
    with pytest.raises(UserError, match=f"hash of .*file.*{sha256(CONTENT)}.* Run the command again") as caught:
        fetch(server.url("file"), tmp_path / "file", sha256(b"another file"), attempts=2)
    assert len(server.requests) == 2
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    (tmp_path / "file").write_bytes(b"damaged")
    assert fetch(server.url("file"), tmp_path / "file", sha256(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_failures_of_the_server_are_tried_again_and_named(server, tmp_path):
    server.failures = [503, 500]
    fetch(server.url("file"), tmp_path / "file", sha256(CONTENT))
    assert len(server.requests) == 3
    with pytest.raises(Unreachable, match="the server answered 404 Not Found"):
        fetch(server.url("none"), tmp_path / "none", None)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_full_disk_is_not_the_servers_doing(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.move", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(server.url("file"), tmp_path / "file", None)
    assert list(tmp_path.iterdir()) == []


def test_no_server_and_no_address(server, tmp_path):
    with pytest.raises(Unreachable, match="refused"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file", None, attempts=2)
    with pytest.raises(UserError, match="no http or https address"):
        fetch("file:///etc/hostname", tmp_path / "file", None)


@pytest.fixture
def published(server, tmp_path):
    """A server with a small VQA-RAD, and the options that point the script to it."""
    rows = json.dumps(vqa_rad_rows()).replace("abd", "synpic1").replace("chest", "synpic2").replace("head", "synpic3")
    server.files["json"] = rows.encode()
    names = [f"synpic{organ}{number}.jpg" for organ in (1, 2, 3) for number in range(4)]
    server.files["zip"] = zipped({f"VQA_RAD Image Folder/{name}": f"picture {name}" for name in names})
    folder = tmp_path / "expected"
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"picture {name}")
    options = ["--output_dir", str(tmp_path / "vqa-rad"), "--train_dir", str(tmp_path / "train"), "--attempts", "2"]
    options += ["--json_url", server.url("json"), "--json_sha256", sha256(server.files["json"])]
    options += ["--images_url", server.url("zip"), "--images_sha256", pictures_sha256(folder, script.PICTURE)]
    return options


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return stream.getvalue()


def test_osf_download_feeds_fusion(server, published, tmp_path, capsys):
    assert script.main(published) == 0
    assert sorted(path.name for path in (tmp_path / "vqa-rad").iterdir()) == ["VQA_RAD_Dataset_Public.json", "images"]
    assert len(list((tmp_path / "vqa-rad/images").iterdir())) == 12
    requests = len(server.requests)
    assert script.main(published) == 0
    assert len(server.requests) == requests  # all there and right
    assert "is complete" in capsys.readouterr().out
    fusion.main(["--data_dir", str(tmp_path / "vqa-rad"), "--output_dir", str(tmp_path / "out")])
    assert len(read_jsonl(tmp_path / "out/test_vqa_rad.jsonl")) == 12


def test_lost_picture_is_fetched_again_and_other_files_stay(server, published, tmp_path):
    script.main(published)
    images = tmp_path / "vqa-rad/images"
    (images / "synpic10.jpg").write_text("damaged")
    (images / "mine.txt").write_text("keep")
    script.main(published)
    assert (images / "synpic10.jpg").read_text() == "picture synpic10.jpg"
    assert (images / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("content", [b"no zip", zipped({"../../synpic10.jpg": "evil"}), zipped({})])
def test_wrong_pictures_are_not_taken(server, published, tmp_path, content):
    server.files["zip"] = content
    with pytest.raises(UserError, match=r"images.zip.* it was removed"):
        script.main(published)
    assert sorted(path.name for path in (tmp_path / "vqa-rad").iterdir()) == ["VQA_RAD_Dataset_Public.json"]
    assert not list(tmp_path.glob("*.jpg"))


def test_truncated_zip_is_not_taken(server, published, tmp_path):
    server.files["zip"] = server.files["zip"][:-100]
    with pytest.raises(UserError, match="no whole zip file"):
        script.main(published)
    assert not (tmp_path / "vqa-rad/images").exists()


def test_another_version_of_the_json_is_not_overwritten(published, tmp_path):
    path = tmp_path / "vqa-rad/VQA_RAD_Dataset_Public.json"
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(UserError, match="another version than the published one"):
        script.main(published)
    assert path.read_text() == "[]"


def test_without_internet_one_line_says_what_to_place_where(published, tmp_path):
    position = published.index("--json_url") + 1
    published[position] = "http://127.0.0.1:9/json"
    with pytest.raises(UserError) as caught:
        script.main(published)
    text = str(caught.value)
    assert "place VQA_RAD_Dataset_Public.json and images/ (315 pictures)" in text
    assert "https://osf.io/89kps/" in text
    assert "\n" not in text


def test_hugging_face_copy_feeds_fusion(published, tmp_path):
    """A local folder in the copy's layout: parquet files with picture bytes, question and answer."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = vqa_rad_rows()[:-2]
    folder = tmp_path / "copy" / "data"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        own = [row for row in rows if row["phrase_type"].startswith("test_") == (split == "test")]
        table = {
            "image": [{"bytes": b"\xff\xd8\xff" + row["image_name"].encode(), "path": None} for row in own],
            "question": [row["question"].lower() for row in own],
            "answer": [str(row["answer"]).lower() for row in own],
        }
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    options = [*published, "--source", "hf", "--hf_dataset", str(tmp_path / "copy")]
    assert script.main(options) == 0
    assert len(list((tmp_path / "vqa-rad/images").iterdir())) == 12  # each picture once
    fusion.main(
        [
            *["--metadata", str(tmp_path / "train/metadata.csv"), "--image_dir", str(tmp_path / "vqa-rad/images")],
            *["--output_dir", str(tmp_path / "out")],
        ]
    )
    train, test = (
        read_jsonl(tmp_path / "out" / name) for name in ("train_vqa_rad_combined.jsonl", "test_vqa_rad.jsonl")
    )
    assert (len(train), len(test)) == (24, 12)
    report = json.loads((tmp_path / "out/fusion_report.json").read_text())["organ_join"]
    assert report["listed"] == []


def test_hugging_face_copy_that_is_not_there(published, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="cannot load .*place metadata.csv with columns image, question, answer, split"):
        script.main([*published, "--source", "hf", "--hf_dataset", str(tmp_path / "none")])
    assert not (tmp_path / "train/metadata.csv").exists()
