"""The whole app: the command, what it refuses, that it keeps nothing and asks nobody."""

from __future__ import annotations

import http.client
import json
import socket
from urllib.parse import urlsplit

import pytest
from serve.room import NAME, data_url, running

gradio = pytest.importorskip("gradio", reason="the demo needs the serve extra")

from llava.serve import gradio_web_server  # noqa: E402
from llava.serve.app import HEADERS, make_app  # noqa: E402
from llava.utils import UserError  # noqa: E402

ASKED = "is there a lesion"


@pytest.fixture(autouse=True)
def own_limit(monkeypatch):
    """The command sets how many pixels a picture may have, for its process."""
    monkeypatch.setenv("LLAVA_MAX_PIXELS", "100000000")


@pytest.fixture(scope="module")
def address(place):
    with running(make_app(place.service)) as found:
        yield found


def request(address, method, path, body=None, **headers):
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def test_page_and_api_are_one_process(place, address):
    status, headers, body = request(address, "GET", "/")
    assert status == 200 and b"Not for clinical use" in body
    assert all(headers[name] == value for name, value in HEADERS.items())
    picture = {"type": "image_url", "image_url": {"url": data_url(place.png(0))}}
    asked = {"model": NAME, "messages": [{"role": "user", "content": [picture, {"type": "text", "text": ASKED}]}]}
    status, _, body = request(
        address, "POST", "/v1/chat/completions", json.dumps(asked), **{"Content-Type": "application/json"}
    )
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == place.truth(ASKED, 0)


def test_the_page_names_no_other_machine_that_it_would_load_from(address):
    """Addresses in its head are words for search engines; what is loaded stands in ``src`` and ``href``."""
    _, _, body = request(address, "GET", "/")
    text = body.decode()
    config = json.loads(text.partition("window.gradio_config = ")[2].partition(";</script>")[0])
    loaded = [part.partition('"')[0] for mark in ('src="', 'href="') for part in text.split(mark)[1:]]
    assert loaded and not [name for name in loaded if name.startswith(("http", "//"))]
    assert not config["analytics_enabled"] and not config.get("run_history") and not config["footer_links"]
    assert not [one for one in config["dependencies"] if one["api_visibility"] == "public"]


@pytest.mark.parametrize(
    "path", ["upload", "upload?upload_id=1", "proxy=http://a/", "process_recording", "component_server", "vibe-edit/"]
)
def test_what_writes_files_or_fetches_is_closed(address, path):
    assert request(address, "POST", f"/gradio_api/{path}", b"a" * 100)[0] == 403


@pytest.mark.parametrize("path", ["deep_link?session_hash=a", "proxy=http://a/", "file=a.png", "file/a.png"])
def test_no_address_writes_what_a_page_shows_or_reads_a_file(address, path):
    assert request(address, "GET", f"/gradio_api/{path}")[0] == 403


def test_bodies_and_names_of_other_hosts_are_refused(address):
    assert request(address, "POST", "/gradio_api/queue/join", b" ", **{"Content-Length": "99999999"})[0] == 413
    assert request(address, "GET", "/v1/models", Host="evil.example:80")[0] == 400
    assert request(address, "GET", "/v1/models", Host="localhost:1")[0] == 200


def test_other_addresses_are_said_as_openai_says_them(address):
    status, _, body = request(address, "POST", "/v1/embeddings", b"{}", **{"Content-Type": "application/json"})
    assert status == 404 and json.loads(body)["error"]["type"] == "invalid_request_error"
    for path in ("/docs", "/redoc"):  # FastAPI's pages load scripts from elsewhere
        body = request(address, "GET", path)[2]
        assert not [word for word in (b"swagger", b"redoc.standalone") if word in body]


def words(place, *more):
    return ["--model-path", place.stage, "--model-base", place.base, "--device", "cpu", *more]


def arguments(place, *more):
    given = [str(word) for word in words(place, *more)]
    return gradio_web_server.parse(gradio_web_server.Arguments, given)


def test_the_command_listens_on_this_machine_alone(place, monkeypatch, capsys):
    import uvicorn

    seen = {}

    def run(self, sockets=None):
        seen["at"], seen["app"] = sockets[0].getsockname()[0], self.config.app
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    gradio_web_server.main([str(word) for word in words(place, "--port", 0)])
    assert seen["at"] == "127.0.0.1" and "the demo is at http://127.0.0.1:" in capsys.readouterr().out
    gradio_web_server.main([str(word) for word in words(place, "--port", 0, "--host", "0.0.0.0")])
    assert seen["at"] == "0.0.0.0" and "no password" in capsys.readouterr().out


def test_flags_become_limits_and_examples(place, tmp_path):
    from llava.data.rows import question_row, write_jsonl

    write_jsonl(tmp_path / "q.jsonl", [question_row(1, "1.png", "what side?", "left", "abd", ("abd",))])
    more = ["--max_pictures", 2, "--max_megabytes", 3, "--max_pixels", 500_000, "--at_once", 5, "--max_new_tokens", 7]
    more += ["--question-file", tmp_path / "q.jsonl", "--image-folder", place.images]
    app, service = gradio_web_server.make(arguments(place, *more))
    limits = service.limits
    service.close()
    assert (limits.pictures, limits.picture_bytes, limits.pixels, limits.at_once) == (2, 3 * 2**20, 500_000, 5)
    assert service.generation.max_new_tokens == 7 and service.generation.temperature == 0 and service.name == NAME
    assert limits.new_tokens == 1024


def test_wrong_command_lines_are_said_before_a_model_is_loaded(place, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        gradio_web_server.main([str(word) for word in words(place, "--question-file", "a.jsonl")])
    assert "belong together" in capsys.readouterr().err
    monkeypatch.setattr(gradio_web_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[serve\]'"):
        gradio_web_server.make(arguments(place))


@pytest.mark.parametrize("host", ["", "a..b", "ä" * 70])
def test_a_host_that_is_no_name_is_said(host):
    with pytest.raises(UserError, match="--host"):
        gradio_web_server._listening(host, 0)


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(place):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose another"):
        gradio_web_server.main([str(word) for word in words(place, "--port", taken.getsockname()[1])])
