"""Uploading, downloading and loading by name, against a Hub on localhost; every client is a process of its own.

All of it for VideoChat-Flash, and the round trip for the others.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.saved_tiny import TINY, save_tiny
from tests.hub_server import HubServer
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.videos import make_video

REPO_ID = "tester/tiny-videochat-flash"
WEIGHTS = "model.safetensors"
CUT_AFTER = 20_000  # bytes; the tiny weights are a few times as large


def run_client(hub: HubServer, cache: Path, *steps: list[object], **env: str) -> dict[str, dict]:
    """Runs steps of `hub_client.py` in one process and returns their results by name."""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hub_client.py")), json.dumps(steps, default=str)],
        env={**os.environ, "PYTHONPATH": str(root), **hub.client_env(cache), **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{steps} failed:\n{result.stderr[-3000:]}"
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny checkpoint with its card."""
    from longvideo.hub_cards.render import render_card

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    (folder / "README.md").write_text(render_card(folder, license="apache-2.0", repo_id=REPO_ID))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    make_video(path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub: HubServer, folder: Path, video: Path, cache: Path) -> dict[str, dict]:
    """What a client saw that pushed, downloaded (the weights were cut once) and asked for what is not there."""
    hub.cuts[WEIGHTS] = CUT_AFTER
    missing = ["ask_for_missing", REPO_ID]
    return run_client(hub, cache, ["push", folder, REPO_ID], ["download", REPO_ID, video], missing)


def test_push_uploads_model_processor_and_card(hub: HubServer, folder: Path, online: dict) -> None:
    files = hub.repositories[f"models/{REPO_ID}"].files
    expected = {"config.json", WEIGHTS, "processor_config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert expected <= set(files)
    assert files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert not [name for name in files if name.endswith(".py")], "no code is shipped with a checkpoint"
    assert "auto_map" not in json.loads(files["config.json"])


def test_model_and_processor_load_by_name(online: dict) -> None:
    assert online["download"]["weights"] == online["push"]["weights"]
    assert online["download"]["model"] == "VideoChatFlashForConditionalGeneration"
    assert online["download"]["processor"] == "VideoChatFlashProcessor"


def test_pipeline_loads_by_name_with_and_without_task(online: dict) -> None:
    by_task, by_tag = online["download"]["by_task"], online["download"]["by_tag"]
    assert by_task["task"] == "video-question-answering"
    assert by_tag["task"] == "video-text-to-text", "the task comes from the tag of the card"
    assert isinstance(by_task["answer"], str) and by_task["answer"] == by_tag["answer"]


def test_interrupted_download_resumes(hub: HubServer, online: dict) -> None:
    ranges = [wanted for method, path, wanted in hub.log if method == "GET" and path.endswith(WEIGHTS)]
    assert WEIGHTS not in hub.cuts, "the download was not cut"
    first = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert ranges == [None, f"bytes={first}-"]
    assert 0 < first <= CUT_AFTER, "the second request continues where the first was cut"
    assert online["download"]["weights"] == online["push"]["weights"]


def test_offline_after_download(hub: HubServer, online: dict, video: Path, cache: Path) -> None:
    num_requests = len(hub.log)
    steps = ["download_offline", REPO_ID, video]
    offline = run_client(hub, cache, steps, HF_HUB_OFFLINE="1")["download_offline"]
    assert len(hub.log) == num_requests, "an offline client asked the server"
    assert offline["weights"] == online["push"]["weights"]
    assert offline["processor"] == "VideoChatFlashProcessor"
    assert offline["answer"] == online["download"]["by_task"]["answer"]


def test_error_without_import(hub: HubServer, online: dict, cache: Path) -> None:
    results = run_client(hub, cache, ["load_without_import", REPO_ID])["load_without_import"]
    for part in ("config", "model"):
        assert "`videochat_flash`" in results[part] and "does not recognize this architecture" in results[part]
    # The cards warn of this one: no error, and no processor either.
    assert results["processor"] not in ("", "VideoChatFlashProcessor")


def test_error_for_missing_repository_and_file(online: dict) -> None:
    results = online["ask_for_missing"]
    assert (
        results["repository"].startswith("OSError") and "tester/absent is not a local folder" in results["repository"]
    )
    assert results["revision"].startswith("OSError") and "absent is not a valid git identifier" in results["revision"]
    assert "EntryNotFoundError" in results["file"] and "absent.json" in results["file"]


@pytest.mark.parametrize("model_type", TINY)
def test_round_trip(model_type: str, hub: HubServer, video: Path, tmp_path: Path) -> None:
    from longvideo.hub_cards.render import render_card

    folder, repo_id = save_tiny(model_type, tmp_path / "tiny"), f"tester/tiny-{model_type}"
    (folder / "README.md").write_text(render_card(folder, license="apache-2.0", repo_id=repo_id))
    results = run_client(hub, tmp_path / "cache", ["push", folder, repo_id], ["download", repo_id, video])
    files, download = hub.repositories[f"models/{repo_id}"].files, results["download"]
    expected = {"config.json", WEIGHTS, "processor_config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert expected <= set(files) and not [name for name in files if name.endswith(".py")]
    assert download["weights"] == results["push"]["weights"]
    prefix = TINY[model_type].prefix
    assert (download["model"], download["processor"]) == (f"{prefix}ForConditionalGeneration", f"{prefix}Processor")
    assert isinstance(download["by_task"]["answer"], str)
    assert download["by_task"]["answer"] == download["by_tag"]["answer"]
    assert download["by_tag"]["task"] == "video-text-to-text"
