"""What the tests of `test_hub.py` do as a client, in a process of its own: `python hub_client.py STEPS`.

A client reads the Hub's address and the offline switch when `huggingface_hub` is imported. STEPS is a JSON list of
lists, each the name of a function below and its arguments; one JSON object with their results is printed.
"""

import hashlib
import json
import sys
from collections.abc import Callable

QUESTION = "What happens?"


def push(folder: str, repo_id: str) -> dict[str, object]:
    """Pushes a saved model, its processor and its card the way users do."""
    from huggingface_hub import upload_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import longvideo  # noqa: F401

    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.push_to_hub(repo_id)
    AutoProcessor.from_pretrained(folder).push_to_hub(repo_id)
    upload_file(path_or_fileobj=f"{folder}/README.md", path_in_repo="README.md", repo_id=repo_id)
    return {"weights": digest(model)}


def download(repo_id: str, video: str) -> dict[str, object]:
    """Loads by name: model, processor, and the pipeline with and without a task."""
    import huggingface_hub.constants
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    import longvideo  # noqa: F401

    # The client keeps only whole chunks of a cut answer, and one chunk is larger than the tiny file.
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1024
    model = AutoModelForImageTextToText.from_pretrained(repo_id)
    processor = AutoProcessor.from_pretrained(repo_id)
    results = {"weights": digest(model), "model": type(model).__name__, "processor": type(processor).__name__}
    for name, options in (("by_task", {"task": "video-question-answering"}), ("by_tag", {})):
        pipe = pipeline(model=repo_id, **options)
        answer = pipe(video=video, question=QUESTION, max_new_tokens=3)["answer"]
        results[name] = {"task": pipe.task, "answer": answer}
    return results


def download_offline(repo_id: str, video: str) -> dict[str, object]:
    """Loads by name without the server, which only a cache filled before makes possible."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    import longvideo  # noqa: F401

    model = AutoModelForImageTextToText.from_pretrained(repo_id)
    processor = AutoProcessor.from_pretrained(repo_id)
    pipe = pipeline("video-question-answering", model=repo_id)
    answer = pipe(video=video, question=QUESTION, max_new_tokens=3)
    return {"weights": digest(model), "processor": type(processor).__name__, "answer": answer["answer"]}


def load_without_import(repo_id: str) -> dict[str, object]:
    """Loads by name in a process that never imports the package."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    results = {
        "config": error_of(lambda: AutoConfig.from_pretrained(repo_id)),
        "model": error_of(lambda: AutoModelForImageTextToText.from_pretrained(repo_id)),
        "processor": type(AutoProcessor.from_pretrained(repo_id)).__name__,
    }
    assert not any(name.split(".")[0] == "longvideo" for name in sys.modules)
    return results


def ask_for_missing(repo_id: str) -> dict[str, object]:
    """Asks for a repository, a revision and a file that do not exist."""
    from huggingface_hub import hf_hub_download
    from transformers import AutoModelForImageTextToText

    import longvideo  # noqa: F401

    load = AutoModelForImageTextToText.from_pretrained
    return {
        "repository": error_of(lambda: load("tester/absent")),
        "revision": error_of(lambda: load(repo_id, revision="absent")),
        "file": error_of(lambda: hf_hub_download(repo_id, "absent.json")),
    }


def digest(model: object) -> str:
    """Returns a hash over names and values of a model's weights."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def error_of(call: Callable[[], object]) -> str:
    """Returns class and text of the error that a call raises, or "" where it raises none."""
    try:
        call()
    except Exception as error:  # the caller compares what was raised
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    functions = {
        step.__name__: step for step in (push, download, download_offline, load_without_import, ask_for_missing)
    }
    print(json.dumps({name: functions[name](*arguments) for name, *arguments in json.loads(sys.argv[1])}))
