"""Pushing to the hub: its real client, and a server on this machine that plays the hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from detr_exp import export_weights
from detr_exp.published import push as pushing
from detr_exp.published.push import PushError, push, refuse_push, signed

REPO = "jane/cells"
TOKEN = "hf_" + "a" * 30
FILES = ("README.md", "model.safetensors")
CARD = b"---\nlibrary_name: transformers\n---\n\n# cells\n"


@dataclass
class Hub:
    """The server.

    Attributes:
        repos: name -> files, and whether it is private.
        answers: (method, beginning of a path) -> status that it answers with instead, as often as the number says.
        asked: method, path and headers of every request.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def did(self, method: str, part: str) -> bool:
        return any(m == method and part in path for m, path, _ in self.asked)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, content: object = None, **headers: str) -> None:
            body = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            with suppress(ConnectionError):  # the client may have given up
                self.end_headers()
                self.wfile.write(body)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append((self.command, self.path, dict(self.headers)))
            path = self.path.partition("?")[0]
            for place, status in hub.answers.items():
                if f"{self.command} {path}".startswith(place):
                    if status == 0:
                        time.sleep(0.6)
                    self.answer(status or 200, {"error": "as planned"}, X_Error_Message="as planned")
                    return
            if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
                self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
                return
            deeds: dict[str, Callable[[bytes, Any], None]] = {
                r"(?:GET|HEAD) /(.+)/resolve/main/(.+)": self.file,
                r"POST /api/repos/create": self.create,
                r"POST /api/validate-yaml": lambda _, __: self.answer(200, {"errors": [], "warnings": []}),
                r"GET /api/models/([^/]+/[^/]+)(?:/revision/main)?": self.info,
                r"POST /api/models/(.+)/preupload/main": self.preupload,
                r"POST /(.+)\.git/info/lfs/objects/batch": self.batch,
                r"PUT /lfs/(\w+)": self.store,
                r"POST /verify": lambda _, __: self.answer(200),
                r"POST /api/models/(.+)/commit/main": self.commit,
            }
            for pattern, deed in deeds.items():
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    deed(body, match)
                    return
            self.answer(404)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def create(self, body: bytes, _: Any) -> None:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in hub.repos:
                self.answer(409, {"url": f"{hub.url}/{repo}", "error": "You already created this model repo"})
                return
            hub.repos[repo] = {".gitattributes": b""}
            hub.private[repo] = asked.get("visibility") == "private" or asked.get("private", False)
            self.answer(200, {"url": f"{hub.url}/{repo}"})

        def info(self, _: bytes, match: Any) -> None:
            if match[1] not in hub.repos:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in hub.repos[match[1]]]
            self.answer(200, {"id": match[1], "sha": "c" * 40, "siblings": siblings, "private": True})

        def file(self, _: bytes, match: Any) -> None:
            content = hub.repos.get(match[1], {}).get(match[2])
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        def preupload(self, body: bytes, _: Any) -> None:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": modes})

        def batch(self, body: bytes, _: Any) -> None:
            objects = [
                {
                    **one,
                    "actions": {
                        "upload": {"href": f"{hub.url}/lfs/{one['oid']}"},
                        "verify": {"href": f"{hub.url}/verify"},
                    },
                }
                for one in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

        def store(self, body: bytes, match: Any) -> None:
            hub.stored[match[1]] = body
            self.answer(200)

        def commit(self, body: bytes, match: Any) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repos[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[match[1]][value["path"]] = hub.stored[value["oid"]]
            self.answer(200, {"commitUrl": f"{hub.url}/{match[1]}/commit/c", "commitOid": "c" * 40})

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which is another protocol
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    (made / ".hydra").mkdir(parents=True)
    (made / ".hydra" / "config.yaml").write_text("data: /home/jane\n")
    (made / "README.md").write_bytes(CARD)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return made


def test_files_come_into_a_private_repository_in_one_commit(hub: Hub, folder: Path) -> None:
    refuse_push(REPO, FILES, replace=False)
    assert push(folder, REPO, FILES, private=True) == f"{hub.url}/{REPO}"
    assert hub.repos[REPO] == {".gitattributes": b""} | {name: (folder / name).read_bytes() for name in FILES}
    assert hub.private[REPO]
    assert set(hub.stored) == {hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
    assert sum("/commit/" in path for _, path, _ in hub.asked) == 1
    tokens = {path: headers.get("Authorization", headers.get("authorization")) for _, path, headers in hub.asked}
    assert tokens[f"/api/models/{REPO}/commit/main"] == f"Bearer {TOKEN}"
    assert tokens[f"/lfs/{next(iter(hub.stored))}"] is None  # storage is another host's


def test_files_of_a_repository_are_replaced_only_on_request(hub: Hub, folder: Path) -> None:
    hub.repos[REPO] = {"README.md": b"written by hand", "notes.txt": b"mine"}
    with pytest.raises(ValueError, match=rf"{REPO} has README\.md already; .*replace=true"):
        refuse_push(REPO, FILES, replace=False)
    assert not hub.did("POST", "commit")
    refuse_push(REPO, FILES, replace=True)
    push(folder, REPO, FILES, private=False)
    assert hub.repos[REPO]["README.md"] == b"written by hand"
    assert hub.repos[REPO]["notes.txt"] == b"mine"
    assert hub.repos[REPO]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("edited", "stays"), [("", False), ("thanks to Joe\n", True)])
def test_a_card_is_replaced_unless_somebody_has_edited_it(edited: str, stays: bool, hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text(signed("# first\n"))
    push(folder, REPO, FILES, private=True)
    before = hub.repos[REPO]["README.md"] = hub.repos[REPO]["README.md"] + edited.encode()
    (folder / "README.md").write_text(signed("# second\n"))
    push(folder, REPO, FILES, private=True)
    assert hub.repos[REPO]["README.md"] == (before if stays else signed("# second\n").encode())


@pytest.mark.parametrize(
    "word", ["cells", "jane/cells/v1", "jane/a--b", "jane/", "https://huggingface.co/jane/cells", ""]
)
def test_other_names_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"names no repository; write push=owner/name"):
        refuse_push(word, FILES, replace=False)


@pytest.mark.parametrize("why", ["ours", "theirs", "no network", "no token"])
def test_what_cannot_be_pushed_is_said_at_once(why: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "ours":
        monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    elif why == "theirs":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif why == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    else:
        monkeypatch.delenv("HF_TOKEN")
    messages = {
        "ours": "needs the network, and DETR_EXP_OFFLINE is set; unset it, or leave push out",
        "theirs": "needs the network, and HF_HUB_OFFLINE is set",
        "no network": r"needs the network: no network: hub\.invalid is not known",
        "no token": "needs a token of the hub with write access; .*HF_TOKEN",
    }
    begun = time.monotonic()
    with pytest.raises(ValueError, match=messages[why]):
        refuse_push(REPO, FILES, replace=False)
    assert time.monotonic() - begun < 1
    assert hub.asked == []


# what the hub answers where -> what is said, and whether the user has to change something
ANSWERS: dict[str, tuple[dict[str, int], type[Exception], str]] = {
    "token not valid": ({"GET /api/models": 401}, ValueError, "answers 401: HF_TOKEN is not valid; make one at"),
    "no right to create": ({"POST /api/repos": 403}, ValueError, "answers 403: HF_TOKEN may not write there"),
    "no right to commit": ({"POST /api/models/jane/cells/commit": 403}, ValueError, "answers 403.*may not write there"),
    "card refused": ({"POST /api/validate": 400}, ValueError, "answers 400: the hub does not take it"),
    "changed meanwhile": (
        {"POST /api/models/jane/cells/commit": 409},
        ValueError,
        "answers 409: somebody else changes",
    ),
    "commit fails": ({"POST /api/models/jane/cells/commit": 500}, PushError, "cannot be used .*may succeed later"),
    "storage fails": ({"PUT /lfs": 507}, PushError, "cannot be used .*may succeed later"),
    "silent": ({"POST /api/repos": 0}, PushError, r"cannot be used \(.*tim.*\); the same command may succeed later"),
}


@pytest.mark.parametrize(("answers", "kind", "message"), ANSWERS.values(), ids=ANSWERS)
def test_answers_of_the_hub_become_words(
    answers: dict[str, int],
    kind: type[Exception],
    message: str,
    hub: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pushing, "PATIENCE", 0.3)
    hub.answers = answers

    def pushed() -> None:
        refuse_push(REPO, FILES, replace=False)
        push(folder, REPO, FILES, private=True)

    with pytest.raises(kind, match=message) as caught:
        pushed()
    assert type(caught.value) is kind
    assert TOKEN not in str(caught.value)
    assert "model.safetensors" not in hub.repos.get(REPO, {})
    hub.answers = {}
    pushed()  # the same command again
    assert "model.safetensors" in hub.repos[REPO]


def test_the_command(
    hub: Hub, trained: Path, command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={trained}", f"push={REPO}", "licence=CC-BY-4.0"]
    hub.answers = {"POST /api/repos": 500}
    assert command(export_weights.main, *words, "hydra.run.dir=first") == 1
    told = capfd.readouterr()
    assert f"written to {tmp_path / 'first'}" in told.out
    assert "the same command may succeed later" in told.err
    assert "Traceback" not in told.err
    hub.answers = {}
    assert command(export_weights.main, *words, "hydra.run.dir=second") == 0
    assert f"pushed to {hub.url}/{REPO}" in capfd.readouterr().out
    assert set(hub.repos[REPO]) == {".gitattributes", *export_weights.IN_FOLDER}
    assert "license: cc-by-4.0" in hub.repos[REPO]["README.md"].decode()
    assert command(export_weights.main, *words, "hydra.run.dir=third") == 2
    assert "has README.md, config.json" in capfd.readouterr().err
    assert not (tmp_path / "third").exists()


def test_offline_the_command_answers_before_slow_imports(tmp_path: Path) -> None:
    code = (
        "import atexit, sys; from detr_exp import export_weights; "
        "atexit.register(lambda: print('slow:', {'torch', 'huggingface_hub'} & set(sys.modules))); "
        "export_weights.main()"
    )
    words = [sys.executable, "-c", code, "checkpoint=absent", "push=jane/cells"]
    environment = os.environ | {"DETR_EXP_OFFLINE": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "DETR_EXP_OFFLINE is set" in done.stderr
    assert "slow: set()" in done.stdout
    assert list(tmp_path.iterdir()) == []
