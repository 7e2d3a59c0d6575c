from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from fakes import modelscope_server
from fakes.modelscope_server import PRIVATE, PUBLIC, Repository, State

from qwen_tune.errors import PublishError
from qwen_tune.publishing.modelscope import ModelScope
from qwen_tune.publishing.remote import Account, create_repository
from qwen_tune.publishing.remote import Repository as Found

TOKEN = "ms-canary-2b7e151628aed2a6"
NAME = "alice/adapter"
WEIGHTS = b"\x00weights" * 20_000
FILES = {
    "README.md": b"# A model\n",
    "adapter_config.json": b"{}\n",
    "adapter_model.safetensors": WEIGHTS,
    "samples/first.txt": "你好\n".encode(),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[State]:
    """ModelScope for one account, whose token is in the environment."""
    with modelscope_server.serve("alice", TOKEN) as state:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", state.address)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        yield state


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every sleep; nothing really sleeps."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture(autouse=True)
def secrecy(capfd: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Checks that neither the output nor any message that a test adds contains the token."""
    texts: list[str] = []
    yield texts
    assert TOKEN not in "".join([*capfd.readouterr(), *texts])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def push(folder: Path, *, revision: str | None = None) -> str:
    hub = ModelScope()
    repository = hub.find(NAME) or create_repository(hub, NAME, private=True)
    return hub.upload(repository, folder, revision=revision, create_pr=False, title="A push")


def refusal(secrecy: list[str], call: object, *arguments: object, **options: object) -> str:
    """Returns the message of a call that is refused."""
    assert callable(call)
    with pytest.raises(PublishError) as caught:
        call(*arguments, **options)
    secrecy.append(str(caught.value) + repr(caught.value.__cause__))
    return str(caught.value)


def test_a_private_repository_gets_the_folder(
    server: State, folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert push(folder) == f"{server.address}/models/{NAME}"
    assert server.repositories[NAME].visibility == PRIVATE
    assert server.repositories[NAME].branches["master"] == FILES
    assert len(server.asked("POST /api/v1/models$")) == 1
    assert len(server.asked("PUT /lfs/")) == 1, "one blob; the small files go with the commit"
    assert capfd.readouterr() == ("", "")
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == set(FILES)
    kept = {str(file.relative_to(tmp_path)) for root in ("home", "cache") for file in (tmp_path / root).rglob("*")}
    assert kept <= {"home/credentials", "home/credentials/session"}


def test_existing_files_are_not_sent_again(server: State, folder: Path) -> None:
    push(folder)
    server.requests.clear()
    push(folder)
    assert server.asked("PUT|POST") == []
    (folder / "README.md").write_bytes(b"# B model\n")
    push(folder)
    (commit,) = server.asked("POST .*/commit/")
    assert '"README.md"' in commit
    assert "adapter" not in commit.replace(NAME, "")
    assert server.asked("PUT") == []
    assert server.repositories[NAME].branches["master"] == {**FILES, "README.md": b"# B model\n"}


def test_a_broken_upload_resumes(server: State, folder: Path, secrecy: list[str]) -> None:
    server.fail("POST .*/commit/", 403)
    refusal(secrecy, push, folder)
    push(folder)
    assert len(server.asked("PUT /lfs/")) == 1
    assert server.repositories[NAME].branches["master"] == FILES


def test_links_are_followed(server: State, folder: Path, tmp_path: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    (folder / "samples").rename(tmp_path / "samples")
    (folder / "samples").symlink_to(tmp_path / "samples")
    push(folder)
    assert server.repositories[NAME].branches["master"] == FILES


def test_weights_of_an_earlier_push_are_deleted(server: State, folder: Path, secrecy: list[str]) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"kept", "other/model.safetensors": b"kept"}
    server.repositories[NAME] = Repository(PRIVATE, {"master": dict(old)})
    hub = ModelScope()
    found = hub.find(NAME)
    assert found
    assert hub.files(found, None) == set(old)
    gone = ["model-00001-of-00002.safetensors", "never-there.safetensors"]
    hub.upload(found, folder, revision=None, create_pr=False, title="A push", delete=gone)
    del old["model-00001-of-00002.safetensors"]
    assert server.repositories[NAME].branches["master"] == {**FILES, **old}


def test_a_broken_link_is_refused(server: State, folder: Path, secrecy: list[str]) -> None:
    (folder / "gone").symlink_to(folder / "nowhere")
    assert "gone: is a broken link" in refusal(secrecy, push, folder)


def test_a_new_repository_that_is_public_is_refused(server: State, secrecy: list[str]) -> None:
    server.always_public = True
    message = refusal(secrecy, create_repository, ModelScope(), NAME, private=True)
    created = "alice/adapter: it was to be created as a private repository, and it is public; nothing was uploaded"
    assert created in message
    assert create_repository(ModelScope(), "alice/open", private=False).private is False


def test_the_upload_creates_no_repository(server: State, folder: Path, secrecy: list[str]) -> None:
    gone = Found(NAME, True, "")
    message = refusal(secrecy, ModelScope().upload, gone, folder, revision=None, create_pr=False, title="A push")
    assert "it does not exist" in message
    assert server.repositories == {}
    assert server.asked("POST /api/v1/models$") == []


def test_find(server: State) -> None:
    server.repositories["alice/open"] = Repository(PUBLIC)
    server.repositories["alice/closed"] = Repository(PRIVATE)
    hub = ModelScope()
    assert hub.find("alice/open") == Found("alice/open", False, f"{server.address}/models/alice/open")
    assert hub.find("alice/closed") == Found("alice/closed", True, f"{server.address}/models/alice/closed")
    assert hub.find("alice/none") is None


def test_account_and_card(server: State, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.repositories["qwen/base"] = Repository(branches={"master": {"README.md": b"# Qwen\n"}, "bare": {}})
    hub = ModelScope()
    assert hub.account() == Account("alice", None)
    assert hub.read_card("qwen/base") == "# Qwen\n"
    assert hub.read_card("qwen/base", "bare") is None
    assert hub.read_card("qwen/none") is None
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert capfd.readouterr() == ("", "")


def test_branches_tags_and_pull_requests(server: State, folder: Path, secrecy: list[str]) -> None:
    message = refusal(secrecy, push, folder, revision="next")
    assert "there is no branch next, and ModelScope's client cannot create one" in message
    server.repositories[NAME].branches["next"] = {}
    push(folder, revision="next")
    assert server.repositories[NAME].branches == {"master": {}, "next": FILES}
    hub = ModelScope()
    found = hub.find(NAME)
    assert found
    hub.tag(found, "v1", "next")
    assert server.repositories[NAME].tags == {"v1": "next"}
    hub.tag(found, "v1", None)
    assert server.repositories[NAME].tags == {"v1": "next"}
    options = {"revision": None, "create_pr": True, "title": "A push"}
    assert "cannot open pull requests" in refusal(secrecy, hub.upload, found, folder, **options)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, "the token is not accepted (HTTP 401: refused by the test, for ***). Fix: run `modelscope login`, or"),
        (403, "the token does not allow that (HTTP 403"),
        (404, "it does not exist, or the account cannot see it (HTTP 404"),
        (409, "it already exists, or somebody else is changing it (HTTP 409"),
        (418, "its client gave up (HTTP 418"),
        (429, "there were too many requests (HTTP 429"),
        (500, "the server failed (HTTP 500"),
        (None, "the connection failed (Connection"),
    ],
)
def test_refusals(server: State, folder: Path, secrecy: list[str], status: int | None, expected: str) -> None:
    server.fail("POST /api/v1/models$", status, 100)
    message = refusal(secrecy, ModelScope().create, NAME, private=True)
    assert message.startswith("ModelScope: cannot create alice/adapter; ")
    assert expected in message
    assert len(server.asked("POST /api/v1/models$")) == (5 if status in (None, 429, 500) else 1)
    server.faults.clear()
    ModelScope().create(NAME, private=True)
    server.fail("POST .*/commit/", status, 100)
    message = refusal(secrecy, push, folder)
    assert message.startswith("ModelScope: cannot upload to alice/adapter; ")
    assert expected in message
    assert "\n" not in message


def test_a_token_that_is_refused(server: State, secrecy: list[str]) -> None:
    server.token = "another"
    assert "cannot find the owner of the token; the token is not accepted (HTTP 401" in refusal(
        secrecy, ModelScope().account
    )


@pytest.mark.parametrize("status", [429, 500, None])
@pytest.mark.parametrize(
    "where",
    [
        "GET .*users/me",
        "GET /api/v1/models/alice/adapter$",
        "GET .*/repo[?]",
        "GET .*/repo/files",
        "GET .*/revisions",
        "POST .*models$",
        "POST .*/batch",
        "PUT",
        "POST .*/commit/",
        "POST .*tag",
    ],
)
def test_temporary_faults_are_retried(
    server: State, folder: Path, capfd: pytest.CaptureFixture[str], status: int | None, where: str
) -> None:
    server.fail(where, status, 2)
    hub = ModelScope()
    hub.account()
    push(folder)
    found = hub.find(NAME)
    assert found
    hub.tag(found, "v1", None)
    assert hub.read_card(NAME) == FILES["README.md"].decode()
    assert server.repositories[NAME] == Repository(PRIVATE, {"master": FILES}, {"v1": "master"})
    reported = capfd.readouterr()
    assert reported.out == ""
    # After a first batch of addresses has failed, the client asks for each file's at once, without a wait.
    assert reported.err.count("\n") == (1 if "batch" in where else 2)
    assert all(line.startswith("ModelScope does not answer") for line in reported.err.splitlines())


def test_the_server_says_how_long_to_wait(
    server: State, waits: list[float], secrecy: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    server.fail("POST .*models$", 429, 2, Retry_After="7")
    ModelScope().create(NAME, private=True)
    assert waits == [7, 7]
    assert "ModelScope does not answer ([E1021] [429] refused by the test, for ***" in capfd.readouterr().err
    server.fail("POST .*models$", 429, 1, Retry_After="3600")
    assert "HTTP 429" in refusal(secrecy, ModelScope().create, "alice/later", private=True)


def test_an_answer_that_got_lost(server: State) -> None:
    server.fail("POST .*models$", None, after=True)
    assert create_repository(ModelScope(), NAME, private=True).private


def test_an_answer_that_is_not_json(server: State, secrecy: list[str]) -> None:
    server.fail("GET .*users/me", 200, body=b"<html>")
    assert "does not name the owner of the token" in refusal(secrecy, ModelScope().account)
    server.repositories[NAME] = Repository()
    server.fail("GET .*models/", 200, body=b"<html>")
    assert "cannot look for alice/adapter; its client gave up" in refusal(secrecy, ModelScope().find, NAME)


def test_no_server(monkeypatch: pytest.MonkeyPatch, server: State, secrecy: list[str]) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert "the connection failed" in refusal(secrecy, ModelScope().account)


def test_tokens(monkeypatch: pytest.MonkeyPatch, server: State, secrecy: list[str], tmp_path: Path) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", f" {TOKEN}\n")
    assert ModelScope().account().name == "alice"
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN + "\nX")
    assert "the token has invalid characters" in refusal(secrecy, ModelScope().account)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    message = refusal(secrecy, ModelScope().account)
    assert message.startswith("ModelScope: there is no token. Fix: run `modelscope login`, or set MODELSCOPE_API_TOKEN")
    from modelscope_hub import HubConfig

    HubConfig().save_token(TOKEN)
    assert ModelScope().account().name == "alice"
    (tmp_path / "home/credentials/cookies").write_bytes(b"")
    assert "the saved login cannot be read" in refusal(secrecy, ModelScope().account)
    assert ModelScope().token is None


def test_without_the_client(tmp_path: Path) -> None:
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError")
    code = "from qwen_tune.publishing.modelscope import ModelScope; ModelScope()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "ModelScope: its client is not installed. Fix: pip install 'qwen-tune[modelscope]'" in done.stderr


def test_the_module_is_light() -> None:
    code = (
        "import sys, qwen_tune.publishing.modelscope as m; assert not {'modelscope_hub', 'requests'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def command(run: Path, *more: str) -> list[str]:
    named = ["--to", "modelscope", "--base-id", "qwen/tiny", "--license", "apache-2.0"]
    return [str(Path(sys.executable).with_name("qwen-tune")), "push", str(run), NAME, *named, *more]


def test_a_run_is_pushed_with_its_card(server: State, trained: tuple[Path, str], tmp_path: Path) -> None:
    run = trained[0]
    planned = subprocess.run(command(run, "--dry-run"), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert planned.returncode == 0, planned.stderr
    assert f"ModelScope: {NAME} (private, will be created), as alice" in planned.stdout
    assert server.asked("PUT|POST") == []
    done = subprocess.run(command(run), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed adapter of quickstart: {server.address}/models/{NAME} (private)\n"
    assert done.stderr == ""
    files = server.repositories[NAME].branches["master"]
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert files["loss.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    assert f'name = snapshot_download("{NAME}")' in card
    assert server.repositories[NAME].visibility == PRIVATE
    for name, data in files.items():
        assert str(run.parent).encode() not in data, name
        assert TOKEN.encode() not in data, name


def test_a_killed_push_resumes(server: State, trained: tuple[Path, str], tmp_path: Path) -> None:
    arrived = Event()
    server.held = ("POST .*/commit/", arrived)
    whole = command(trained[0], "--what", "merged")
    process = subprocess.Popen(whole, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert arrived.wait(60)
    process.kill()
    process.wait()
    sent = len(server.asked("PUT /lfs/"))
    assert sent
    done = subprocess.run(whole, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(server.asked("PUT /lfs/")) == sent
    weights = (trained[0] / "merged" / "model.safetensors").read_bytes()
    assert server.repositories[NAME].branches["master"]["model.safetensors"] == weights
