"""Renders the model card of a checkpoint folder from its configuration, its conversion report and measured figures.

The words are in `_template.md` and in one file per architecture, which fills the template's blocks; this module only
gathers the facts.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SOURCES = Path(__file__).parent
MARKER = "<!-- rendered by `longvideo card`"
PIPELINE_TAG = "video-text-to-text"
NUM_TEXT = 64  # tokens of text beside which visual tokens are counted
REPO_ID_PATTERN = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE_PATTERN = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass
class WeightSummary:
    """What the safetensors headers of a folder say.

    Args:
        num_tensors: tensors in all files.
        num_values: values in all tensors.
        dtypes: data types as safetensors names them, sorted.
    """

    num_tensors: int
    num_values: int
    dtypes: list[str]


def render_card(
    folder: str | Path,
    *,
    base_model: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    measured: dict | None = None,
) -> str:
    """Renders the card of a checkpoint folder.

    Args:
        folder: Folder with `config.json`; `conversion_report.json`, `measured.json` and safetensors files are used
            where present.
        base_model: Hub name of the weights this checkpoint comes from; by default the published checkpoint whose name
            the conversion report gives as its source.
        license: Licence id as the Hub writes it; by default that of the published checkpoint named by `base_model`.
        repo_id: Name under which the card's examples load the checkpoint; by default the folder's name.
        measured: Figures in the layout of `measured.json`: `parity`, a list of `quantity`, `max_abs_error`,
            `tolerance`, and `results`, a list of `dataset`, `metric`, `value`, `note`. By default the folder's
            `measured.json`.

    Returns:
        The card, metadata included.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: the architecture has no card source, or a name or a figure is malformed.
    """
    import jinja2  # comes with torch; chat templates need it as well

    from longvideo.evaluation.cost import estimate

    folder = Path(folder)
    config = load_config(folder)
    card, body = load_source(config.model_type)
    report = check_report(read_json(folder / "conversion_report.json"))
    measured = check_measured(read_json(folder / "measured.json") if measured is None else measured)
    if base_model is None and report:
        base_model = find_published(card, report["source"])
    if base_model is not None and not REPO_ID_PATTERN.fullmatch(base_model):
        raise ValueError(f"base model {base_model!r} is not a Hub name; expected owner/name.")
    if license is None and base_model in card["published"]:
        license = card["license"]
    if license is not None and not LICENSE_PATTERN.fullmatch(license):
        raise ValueError(f"licence {license!r} is not a licence id of the Hub; expected one such as apache-2.0.")

    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    facts = {
        "name": name,
        "repo_id": repo_id or name,
        "card": card,
        "config": config,
        "base_model": base_model,
        "license": license,
        "report": report,
        "measured": measured,
        "weights": summarize_weights(folder),
        "estimate": partial(estimate, config),
        "num_text": NUM_TEXT,
        "metadata": render_metadata(card, name, config.model_type, base_model, license, measured["results"]),
    }
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(
            {"_template.md": (SOURCES / "_template.md").read_text(encoding="utf-8"), "body": body}
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = "{:,}".format
    text = environment.get_template("body").render(facts)
    return re.sub(r"\n{3,}", "\n\n", text)


def available_architectures() -> list[str]:
    """Returns the model types that have a card source."""
    return sorted(path.stem for path in SOURCES.glob("[!_]*.md"))


def load_config(folder: Path) -> object:
    """Returns the configuration of a checkpoint folder as the object of its registered class."""
    from transformers import AutoConfig

    import longvideo  # noqa: F401 (registers the architectures)

    settings = read_json(folder / "config.json")
    if settings is None:
        raise FileNotFoundError(
            f"{folder} has no config.json; expected the folder of a saved or converted checkpoint."
        )
    model_type = settings.get("model_type")
    known = available_architectures()
    if model_type not in known:
        raise ValueError(
            f"{folder / 'config.json'} has the model type {model_type!r}; cards exist for {', '.join(known)}. "
            "Convert an original checkpoint first (longvideo convert)."
        )
    return AutoConfig.from_pretrained(folder)


def load_source(model_type: str) -> tuple[dict, str]:
    """Returns the facts and the template of an architecture's card source."""
    import yaml  # comes with huggingface_hub

    _, facts, body = (SOURCES / f"{model_type}.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(facts), body


def read_json(path: Path) -> dict | None:
    """Returns the object in a JSON file, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def check_report(report: dict | None) -> dict | None:
    """Returns a conversion report, or raises where it is none that a card can cite."""
    wanted = {"source", "num_source_tensors", "num_target_tensors", "dropped", "missing"}
    if report is not None and (lacking := wanted - report.keys()):
        raise ValueError(f"conversion_report.json lacks {', '.join(sorted(lacking))}; convert again to renew it.")
    return report


def find_published(card: dict, source: str) -> str | None:
    """Returns the published checkpoint whose name a source folder has, or None."""
    return next((name for name in card["published"] if name.split("/")[1] == source), None)


def check_measured(measured: dict | None) -> dict[str, list[dict]]:
    """Returns measured figures with both lists present, or raises where a row lacks a field."""
    fields = {"parity": {"quantity", "max_abs_error", "tolerance"}, "results": {"dataset", "metric", "value", "note"}}
    measured = measured or {}
    for kind, rows in measured.items():
        if kind not in fields:
            raise ValueError(f"measured figures have the key {kind!r}; expected {', '.join(fields)}.")
        for row in rows:
            if missing := fields[kind] - row.keys():
                raise ValueError(f"a row of measured {kind} lacks {', '.join(sorted(missing))}: {row}.")
    return {kind: list(measured.get(kind, [])) for kind in fields}


def summarize_weights(folder: Path) -> WeightSummary | None:
    """Counts tensors and values from the headers of the folder's safetensors files; None without such files."""
    from safetensors import safe_open

    sizes, dtypes = [], set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(key)
                num_values = 1
                for size in view.get_shape():
                    num_values *= size
                sizes.append(num_values)
                dtypes.add(view.get_dtype())
    return WeightSummary(len(sizes), sum(sizes), sorted(dtypes)) if sizes else None


def render_metadata(
    card: dict, name: str, model_type: str, base_model: str | None, license: str | None, results: list[dict]
) -> str:
    """Returns the YAML block of a card."""
    from huggingface_hub import EvalResult, ModelCardData

    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        license=license,
        language=card["language"],
        base_model=base_model,
        tags=["longvideo", model_type, *card["tags"]],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=PIPELINE_TAG,
                dataset_type=re.sub(r"[^a-z0-9]+", "-", row["dataset"].lower()).strip("-"),
                dataset_name=row["dataset"],
                metric_type=row["metric"],
                metric_value=row["value"],
            )
            for row in results
        ]
        or None,
    )
    return metadata.to_yaml()
