"""The server that the tests of publishing use, against the Hub's real client in both ways that it uploads.

Each way is one process: the client reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import TINY, environment
from fakes.hub_write_server import ServedHub, serve_hub

CLIENT = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download, hf_hub_download
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
folder, cache = map(Path, sys.argv[1:3])
api = HfApi()
say = lambda *values: print(json.dumps(values), flush=True)
def attempt(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except Exception as error:
        cause = error.__cause__
        say(type(error).__name__, type(cause).__name__ if cause else None, str(error))
"""


def client(hub: ServedHub, script: str, folder: Path, cache: Path, **changes: str) -> tuple[list[list], str]:
    """Runs a script with the client's names; gives what it said, line by line, and its stderr."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-c", CLIENT + script, str(folder), str(cache)]
    changes = {"HF_HUB_DISABLE_XET": "1", **settings, **changes}
    result = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


@pytest.fixture
def folder(tmp_path):
    """A model small enough to send often."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "README.md").write_text("---\nbase_model: me/tiny\n---\n# A model\n")
    (model / "config.json").write_text('{"canary": "only-in-config"}')
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    (model / "sub" / "notes.txt").write_text("notes")
    return model


def titles(hub: ServedHub) -> list[str]:
    return [commit.title for commit in hub.repository("me/new").commits.values()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PUBLISH = """
say(api.whoami()["name"], api.whoami()["auth"]["accessToken"]["role"])
say(str(api.create_repo("me/new", private=True)), str(api.create_repo("me/new", private=True, exist_ok=True)))
attempt(api.create_repo, "me/new")
first = api.upload_folder(repo_id="me/new", folder_path=folder, commit_message="first")
again = api.upload_folder(repo_id="me/new", folder_path=folder, commit_message="again")
say(first.oid, again.oid, first.pr_url)
info = api.model_info("me/new", files_metadata=True)
say(info.sha, info.private, {f.rfilename: f.size for f in info.siblings})
say([f.path for f in api.list_repo_tree("me/new")], sorted(f.path for f in api.list_repo_tree("me/new", "sub")))
say([f.path for f in api.get_paths_info("me/new", ["config.json", "nothing"])])
say(api.file_exists("me/new", "config.json"), api.file_exists("me/new", "nothing"))
(folder / "config.json").write_text("{}")
pr = api.create_pull_request("me/new", "Second")
pushed = api.upload_folder(repo_id="me/new", folder_path=folder, revision=pr.git_reference, commit_message="second")
say(pr.status, pr.git_reference, [(d.num, d.status) for d in api.get_repo_discussions("me/new")])
say(api.model_info("me/new", revision="refs/pr/1").sha == pushed.oid, api.model_info("me/new").sha == first.oid)
say(Path(hf_hub_download("me/new", "config.json", revision="refs/pr/1")).read_text())
api.change_discussion_status("me/new", 1, "open")
say(api.get_discussion_details("me/new", 1).status)
other = api.upload_folder(repo_id="me/new", folder_path=folder, create_pr=True, commit_message="a request")
say(other.pr_revision, other.pr_url, api.get_discussion_details("me/new", 2).status)
api.create_tag("me/new", tag="v1"); api.create_branch("me/new", branch="dev", revision="v1")
attempt(api.create_tag, "me/new", tag="v1")
refs = api.list_repo_refs("me/new", include_pull_requests=True)
say([b.name for b in refs.branches], [t.name for t in refs.tags], [p.ref for p in refs.pull_requests])
attempt(api.model_info, "me/new", revision="nothing"); attempt(api.model_info, "me/nothing")
say([c.title for c in api.list_repo_commits("me/new")])
(folder / "config.json").write_text('{"canary": "only-in-config"}')
say(snapshot_download("me/new", revision="v1"))
"""


@pytest.mark.parametrize("way", ["lfs", "lfs in parts", "xet, all regular"])
def test_the_client_publishes_and_reads_back(way, folder, tmp_path):
    lfs = way.startswith("lfs")
    before = contents(folder)
    with serve_hub(lfs=lfs, part_bytes=200_000 if way == "lfs in parts" else None) as hub:
        said, stderr = client(hub, PUBLISH, folder, tmp_path / "cache", HF_HUB_DISABLE_XET="1" if lfs else "0")
        url = f"{hub.address}/me/new"
        assert said[0] == ["me", "write"]
        assert said[1] == [url, url]
        assert said[2][0] == "HfHubHTTPError"
        assert "409" in said[2][2]
        assert said[3][0] == said[3][1]
        assert said[3][2] is None
        files = {".gitattributes": 50, **{path: len(data) for path, data in before.items()}}
        assert said[4] == [said[3][0], True, files]
        top = ["sub", ".gitattributes", "README.md", "config.json", "model.safetensors"]
        assert said[5] == [top, ["sub/notes.txt"]]
        assert said[6:8] == [[["config.json"]], [True, False]]
        assert said[8] == ["draft", "refs/pr/1", [[1, "draft"]]]
        assert said[9:12] == [[True, True], ["{}"], ["open"]]
        assert said[12] == ["refs/pr/2", f"{url}/discussions/2", "open" if lfs else "draft"]
        assert said[13][0] == "HfHubHTTPError"
        assert said[14] == [["main", "dev"], ["v1"], ["refs/pr/1", "refs/pr/2"]]
        assert [line[0] for line in said[15:17]] == ["RevisionNotFoundError", "RepositoryNotFoundError"]
        assert said[17] == [["first", "initial commit"]]
        (folder / ".gitattributes").write_bytes(hub.repository("me/new").files()[".gitattributes"])
        assert contents(Path(said[18][0])) == contents(folder)
        # The second upload sent nothing, and what changed was sent once for each pull request.
        small = ["README.md", "config.json", *([] if lfs else ["model.safetensors"]), "sub/notes.txt"]
        assert hub.received("regular") == [*small, "config.json", "config.json"]
        assert set(hub.received("lfs")) == ({"model.safetensors"} if lfs else set())
        assert b"only-in-config" in hub.bodies
        assert b"hf_test" not in hub.bodies
        assert "No files have been modified" in stderr


RETRIED = """
api.create_repo("me/new")
up = lambda name: api.upload_folder(repo_id="me/new", folder_path=folder, commit_message=name)
attempt(up, "first")
up("second")
"""


def test_without_xet_the_client_sends_files_again_but_not_commits(folder, tmp_path):
    with serve_hub() as hub:
        hub.fail("POST .*/preupload/", status=429, headers={"Retry-After": "0"})
        hub.cut("PUT .*/lfs/", after_bytes=1000)
        hub.fail("POST .*/commit/", status=429, headers={"Retry-After": "0"})
        said, stderr = client(hub, RETRIED, folder, tmp_path / "cache")
        assert len(said) == 1
        assert said[0][0] == "HfHubHTTPError"
        assert "429 Too Many Requests" in said[0][2]
        assert "Rate limited. Waiting 1.0s before retry [Retry 1/5]" in stderr
        assert [size for method, _, size in hub.requests if method == "PUT"] == [1000, 512_000]
        assert titles(hub) == ["initial commit", "second"]
        assert hub.repository("me/new").files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_with_xet_the_client_sends_commits_again_even_twice(folder, tmp_path):
    with serve_hub(lfs=False) as hub:
        hub.cut("POST .*/commit/", after_bytes=1000)
        hub.lose("POST .*/commit/")
        said, _ = client(hub, RETRIED, folder, tmp_path / "cache", HF_HUB_DISABLE_XET="0")
        assert said == []
        assert titles(hub) == ["initial commit", "first", "first"]
        commits = [size for _, path, size in hub.requests if "/commit/" in path]
        assert len(commits) == 3
        assert commits[0] == 1000


def test_what_the_client_raises(folder, tmp_path):
    script = """
api.create_repo("me/new")
up = lambda: api.upload_folder(repo_id="me/new", folder_path=folder)
attempt(up); attempt(up); attempt(up)
attempt(api.whoami); attempt(api.whoami)
"""
    with serve_hub() as hub:
        hub.fail("POST /api/validate-yaml", status=502, headers={"Content-Type": "text/html"}, body=b"<p>no</p>")
        hub.fail("PUT .*/lfs/", status=403)
        hub.cut("POST .*/commit/", after_bytes=10)
        hub.fail("GET /api/whoami-v2", status=500)
        hub.cut("GET /api/whoami-v2")
        said, _ = client(hub, script, folder, tmp_path / "cache")
        assert [line[:2] for line in said] == [
            ["JSONDecodeError", None],
            ["RuntimeError", "HfHubHTTPError"],
            ["RemoteProtocolError", "RemoteProtocolError"],
            ["HfHubHTTPError", "HTTPStatusError"],
            ["RemoteProtocolError", "RemoteProtocolError"],
        ]


def test_a_renamed_repository_is_followed(folder, tmp_path):
    script = """
say(api.model_info("me/old").id, api.file_exists("me/old", "config.json"))
say(Path(hf_hub_download("me/old", "config.json")).read_text())
say(str(api.upload_folder(repo_id="me/old", folder_path=folder, commit_message="renamed").commit_url))
say(api.create_pull_request("me/old", "A request").repo_id)
api.create_tag("me/old", tag="v1")
say(api.create_repo("me/old", exist_ok=True).repo_id, api.model_info("me/old").id)
"""
    with serve_hub() as hub:
        hub.add_folder("me/old", folder)
        (folder / "model.safetensors").write_bytes(b"other")
        config = (folder / "config.json").read_text()
        hub.rename("me/old", "me/new")
        said, _ = client(hub, script, folder, tmp_path / "cache")
        assert said[:2] == [["me/new", True], [config]]
        assert said[2][0].startswith(f"{hub.address}/me/new/commit/")
        assert said[3:] == [["me/new"], ["me/old", "me/old"]]  # the last two are a new repository, which is empty
        assert hub.repository("me/new").files()["model.safetensors"] == b"other"
        assert hub.repository("me/new").refs["refs/tags/v1"] == hub.repository("me/new").at("main").id
        assert sorted(hub.repository("me/old").files()) == [".gitattributes"]


@pytest.mark.parametrize("done", [False, True])
def test_a_client_is_killed_in_a_commit(folder, tmp_path, done):
    with serve_hub() as hub:
        hub.add_folder("me/new", folder)
        (folder / "config.json").write_text("changed")
        arrived, go = hub.hold("POST .*/commit/main", done=done)
        script = 'print("up"); api.upload_folder(repo_id="me/new", folder_path=folder, commit_message="mine")'
        settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_test"}
        command = [sys.executable, "-c", CLIENT + script, str(folder), str(tmp_path)]
        environ = environment(HF_HUB_DISABLE_XET="1", **settings)
        with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            assert arrived.wait(30)
            process.kill()
        go.set()
        client(hub, "api.whoami()", folder, tmp_path)
        assert titles(hub) == ["initial commit", "Add files", *(["mine"] if done else [])]


def test_rights(folder, tmp_path):
    script = """
attempt(api.model_info, "you/secret"); attempt(api.model_info, "you/secret", token=False)
attempt(api.model_info, "you/open", token="hf_wrong"); attempt(api.whoami, token="hf_wrong")
attempt(api.create_repo, "you/mine"); attempt(api.create_repo, "me/mine", token="hf_read")
attempt(api.upload_folder, repo_id="you/open", folder_path=folder)
attempt(api.upload_folder, repo_id="me/open", folder_path=folder, token="hf_read")
attempt(api.create_repo, "me/other", token="hf_fine")
attempt(api.upload_folder, repo_id="me/open", folder_path=folder, token="hf_fine")
say(api.model_info("you/open", token=False).id)
say(api.upload_folder(repo_id="you/open", folder_path=folder, create_pr=True).pr_revision)
fine = api.whoami(token="hf_fine")
say(fine["auth"]["accessToken"]["fineGrained"]["scoped"][0]["permissions"], fine["orgs"][0]["roleInOrg"])
say(api.create_repo("team/new", token="hf_fine").repo_id)
(folder / "README.md").write_text("---\\nbase_model: /data/tiny-qwen\\n---\\n")
attempt(api.upload_folder, repo_id="me/open", folder_path=folder)
"""
    with serve_hub() as hub:
        scoped = {"team": ["repo.content.read", "repo.write"]}
        hub.add_user("me", "hf_read", "read")
        hub.add_user("me", "hf_fine", "fineGrained", orgs={"team": "write"}, scoped=scoped)
        for id in ("you/secret", "you/open", "me/open"):
            hub.add_folder(id, folder, private=id == "you/secret")
        (folder / "config.json").write_text("changed")
        said, _ = client(hub, script, folder, tmp_path / "cache")
        expected = [
            ("RepositoryNotFoundError", "404 Client Error"),
            ("RepositoryNotFoundError", "401 Client Error"),
            ("HfHubHTTPError", "Invalid credentials in Authorization header"),
            ("HfHubHTTPError", "Invalid user token"),
            ("HfHubHTTPError", 'You don\'t have the rights to create a model under the namespace "you"'),
            ("HfHubHTTPError", 'You don\'t have the rights to create a model under the namespace "me"'),
            ("HfHubHTTPError", "pass `create_pr=1`"),
            ("HfHubHTTPError", "you must use a write token"),
            ("HfHubHTTPError", 'You don\'t have the rights to create a model under the namespace "me"'),
            ("HfHubHTTPError", "pass `create_pr=1`"),
        ]
        for line, (name, part) in zip(said, expected, strict=False):
            assert line[0] == name
            assert part in line[2]
        assert said[10:14] == [["you/open"], ["refs/pr/1"], [scoped["team"], "write"], ["team/new"]]
        assert said[14][:2] == ["ValueError", "BadRequestError"]
        assert '"base_model" with value "/data/tiny-qwen" is not valid' in said[14][2]


def test_parts_of_a_file_and_outages_without_the_client():
    with serve_hub() as hub:
        hub.add_folder("me/tiny", TINY)
        address = f"{hub.address}/me/tiny/resolve/main/config.json"
        whole = (TINY / "config.json").read_bytes()
        for given, expected in {"bytes=5-9": whole[5:10], "bytes=800-": whole[800:], "bytes=-7": whole[-7:]}.items():
            with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": given})) as response:
                assert response.status == 206
                assert response.read() == expected
        hub.slow("GET .*/config.json", seconds=0.2)
        hub.fail("GET", status=503, times=math.inf)
        with urllib.request.urlopen(address) as response:
            assert response.read() == whole
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError, match="503") as error:
                urllib.request.urlopen(address)
            error.value.close()
