"""Trains small CrossLMMs with one token per frame and a part changed, and compares them, as Table 2 of the paper does.

    python -m longvideo.tiny_training.ablate_crosslmm --out runs/ablate_crosslmm --seeds 0 1 2

Three questions: what V2V and T2V give, alone and together; every how many layers (K) they should stand; in which
stages T2V should be trained. The decoder is that of the tiny VideoChat-Flash with a second layer behind each of its
four, a copy that adds nothing at first, so that K can be 8. All models have one tower, taught once. A seed decides the
other first weights and the rows; the questions are the same for all. A run that was stopped goes on when the command
is given again; FOLDER/ablation.json and FOLDER/ablation.md are written anew after every model.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longvideo.evaluation.answer_questions import evaluate, load_checkpoint, write_json
from longvideo.evaluation.command import run_command
from longvideo.tiny_training.build_crosslmm import build_crosslmm
from longvideo.tiny_training.models import TINY_MODELS, TinyModel
from longvideo.tiny_training.precision import BF16_HELP
from longvideo.tiny_training.stages import Stage
from longvideo.tiny_training.train import train_model

NUM_LAYERS = 8
BASE_INTERVAL = 4
NUM_RESAMPLES = 2000
ALIGN = Stage("1-align", 1_200, 3e-3, "linear", 20, "full", 0.35, 0.35, 0.5, 0.0)
INSTRUCTIONS = Stage("2-instructions", 4_000, 7e-4, "linear", 20, "full", 0.15, 0.15, 0.5, 0.0)
TUNED_PARTS = ("connector", "language_model", "vision_tower")


@dataclass(frozen=True)
class Variant:
    """One row of the tables.

    Args:
        use_v2v: whether there is V2V, in both stages.
        t2v_stages: the stages with T2V, out of 1 and 2.
        interval: K, every how many layers they stand; None for no cross-attention.
    """

    use_v2v: bool = True
    t2v_stages: tuple[int, ...] = (2,)
    interval: int | None = BASE_INTERVAL


BASE = "both"
VARIANTS = {
    "none": Variant(use_v2v=False, t2v_stages=(), interval=None),
    "v2v": Variant(t2v_stages=()),
    "t2v": Variant(use_v2v=False),
    BASE: Variant(),
    "t2v_in_both_stages": Variant(t2v_stages=(1, 2)),
    "every_layer": Variant(interval=1),
    "every_2_layers": Variant(interval=2),
    "every_8_layers": Variant(interval=8),
}
# Rows of the tables of the paper.
TABLES: dict[str, dict[str, str]] = {
    "2a, modules": {"none": "none", "V2V": "v2v", "T2V": "t2v", "V2V and T2V": BASE},
    "2b, K": {"none": "none", "1": "every_layer", "2": "every_2_layers", "4": BASE, "8": "every_8_layers"},
    "2c, stages with T2V": {"none": "v2v", "both": "t2v_in_both_stages", "the second": BASE},
}


def describe_variant(variant: Variant, spec: TinyModel | None = None) -> TinyModel:
    """Says how the model of a variant is made and taught.

    Args:
        variant: row of the tables.
        spec: what is changed; the tiny CrossLMM when None.

    Returns:
        The description for `train_model`.
    """
    spec = TINY_MODELS["crosslmm"] if spec is None else spec
    has_t2v = 1 in variant.t2v_stages
    learns = [name for name, there in (("v2v", variant.use_v2v), ("t2v", has_t2v)) if there]
    fields = {"use_v2v": variant.use_v2v, "use_t2v": has_t2v, "cross_attention_interval": variant.interval}
    enters = "add_t2v" if 2 in variant.t2v_stages and not has_t2v else None
    return replace(
        spec,
        build=partial(build_crosslmm, num_layers=NUM_LAYERS, tokens_per_frame=1, **fields),
        # Nothing can be taught about one feature of a whole frame cell by cell.
        lessons=spec.lessons[:1],
        stages=(
            replace(ALIGN, trainable_parts=("connector", *learns)),
            replace(INSTRUCTIONS, trainable_parts=TUNED_PARTS, prepare_model=enters),
        ),
    )


def run_variant(
    name: str,
    seed: int,
    out: Path,
    *,
    minutes: float,
    scale: float,
    num: int,
    spec: TinyModel | None = None,
    bf16: bool = False,
) -> bool:
    """Trains the model of a variant and asks it, or finds that this was done.

    Args:
        name: one of `VARIANTS`.
        seed: of first weights and rows.
        out: folder of the whole ablation.
        minutes: time left.
        scale: factor of the length of both stages.
        num: number of held-out questions.
        spec: see `describe_variant`.
        bf16: whether to train in bfloat16; questions are answered in float32.

    Returns:
        Whether its answers are there.
    """
    folder = out / name / f"seed{seed}"
    answers = folder / "answers.json"
    if answers.exists():
        return True
    tower = out / "0-tower"
    tower.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tower, folder / "0-tower", dirs_exist_ok=True)
    described = describe_variant(VARIANTS[name], spec)
    model_folder = train_model(described, folder, minutes=minutes, seed=seed, scale=scale, bf16=bf16)
    for path in (folder / "0-tower").glob("*.safetensors"):
        if not (tower / path.name).exists():
            partial_path = tower / f".{path.name}.partial"
            shutil.copy(path, partial_path)
            partial_path.rename(tower / path.name)
    if model_folder is None:
        return False
    model, processor = load_checkpoint(str(model_folder))
    results = evaluate(model, processor, num)
    kinds = [result.kind for result in results]
    write_json(answers, {"num": num, "kinds": kinds, "correct": [result.correct for result in results]})
    for stage in folder.glob("[0-9]-*"):
        # Checkpoints of all models would fill a disk.
        shutil.rmtree(stage)
    return True


def read_answers(out: Path, num: int) -> dict[str, dict[int, list[bool]]]:
    """Collects what was answered.

    Args:
        out: folder of the whole ablation.
        num: number of questions that every model was asked.

    Returns:
        For each variant that has some, by seed, whether each question was answered right.

    Raises:
        ValueError: models that were asked another number of questions.
    """
    found: dict[str, dict[int, list[bool]]] = {}
    for name in VARIANTS:
        for path in sorted((out / name).glob("seed*/answers.json")):
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["num"] != num:
                raise ValueError(
                    f"{path} holds answers to {told['num']} questions, but --num is {num}. Give --num {told['num']}, "
                    "or another --out."
                )
            found.setdefault(name, {})[int(path.parent.name.removeprefix("seed"))] = told["correct"]
    return found


def interval_over(scores: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a mean over models and questions, both drawn with repetition.

    Args:
        scores: (models, questions), the same questions for every model.
        seed: of the draws.

    Returns:
        Lower and upper end of the 95 % interval. Of one model: over questions alone.
    """
    rng = np.random.default_rng(seed)
    models = rng.integers(len(scores), size=(NUM_RESAMPLES, len(scores)))
    questions = rng.integers(scores.shape[1], size=(NUM_RESAMPLES, scores.shape[1]))
    means = [scores[m][:, q].mean() for m, q in zip(models, questions, strict=True)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarize(found: Mapping[str, Mapping[int, Sequence[bool]]]) -> dict[str, dict[str, Any]]:
    """Accuracy of every variant, and how far it is from the whole model.

    Args:
        found: from `read_answers`.

    Returns:
        For each variant its seeds, `accuracy` with `interval_95`, and, where seeds are shared with the whole model,
        `difference` with `difference_95` over these seeds, question by question.
    """
    summary = {}
    for name, by_seed in found.items():
        scores = np.array([by_seed[seed] for seed in sorted(by_seed)], dtype=float)
        entry: dict[str, Any] = {
            "seeds": sorted(by_seed),
            "by_seed": [round(float(row.mean()), 4) for row in scores],
            "accuracy": float(scores.mean()),
            "interval_95": interval_over(scores),
        }
        shared = sorted(set(by_seed) & set(found.get(BASE, {})))
        if shared and name != BASE:
            gaps = np.array([by_seed[s] for s in shared], dtype=float) - np.array([found[BASE][s] for s in shared])
            entry |= {"difference": float(gaps.mean()), "difference_95": interval_over(gaps)}
        summary[name] = entry
    return summary


def format_tables(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary as the paper's three tables, in markdown; rows without a model are left out."""
    lines = []
    for title, rows in TABLES.items():
        lines += [
            f"Table {title}",
            "",
            "| | seeds | accuracy | 95 % | to both, K = 4 | 95 % |",
            "|---|---|---|---|---|---|",
        ]
        for label, name in rows.items():
            if name not in summary:
                continue
            entry = summary[name]
            low, high = entry["interval_95"]
            cells = [
                label,
                str(len(entry["seeds"])),
                f"{100 * entry['accuracy']:.1f} %",
                f"{100 * low:.1f} - {100 * high:.1f}",
            ]
            if "difference" in entry:
                low, high = entry["difference_95"]
                cells += [f"{100 * entry['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"]
            else:
                cells += ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write_results(out: Path, settings: dict[str, Any]) -> str:
    """Writes `ablation.json` and `ablation.md` of all answers that are there; returns the tables."""
    summary = summarize(read_answers(out, settings["num"]))
    tables = format_tables(summary)
    write_json(out / "ablation.json", {"settings": settings, "chance": 0.25, "summary": summary, "tables": TABLES})
    partial_path = out / ".ablation.md.partial"
    partial_path.write_text(tables, encoding="utf-8")
    partial_path.rename(out / "ablation.md")
    return tables


def ablate(
    out: Path,
    *,
    seeds: Sequence[int],
    names: Sequence[str],
    minutes: float,
    scale: float,
    num: int,
    spec: TinyModel | None = None,
    bf16: bool = False,
) -> bool:
    """Runs all models that are missing, one seed after the other, as far as the time allows.

    Args:
        out: folder of everything.
        seeds: seeds of every variant.
        names: of `VARIANTS`.
        minutes: time of this run.
        scale: factor of the length of both stages.
        num: number of held-out questions.
        spec: see `describe_variant`.
        bf16: see `run_variant`.

    Returns:
        Whether all are done.

    Raises:
        ValueError: models in that folder were trained or asked in another way.
    """
    deadline = time.monotonic() + 60 * minutes
    settings = {"num": num, "scale": scale, "bf16": bf16}
    before = out / "settings.json"
    if before.exists() and (told := json.loads(before.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{out} was begun with {told}, not with {settings}. Give the same again, or another --out.")
    write_json(before, settings)
    for seed in seeds:
        for name in names:
            left = (deadline - time.monotonic()) / 60
            how = {"scale": scale, "num": num, "spec": spec, "bf16": bf16}
            if left <= 0 or not run_variant(name, seed, out, minutes=left, **how):
                return False
            write_results(out, settings)
            print(
                f"{name}, seed {seed}: done, {max(deadline - time.monotonic(), 0) / 60:.0f} minutes left", flush=True
            )
    return True


def main(argv: list[str] | None = None) -> int:
    """Command line of the module."""
    parser = argparse.ArgumentParser(
        prog="longvideo.tiny_training.ablate_crosslmm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablate_crosslmm"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument(
        "--minutes", type=float, default=100.0, help="time of this run; give the command again to go on"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the length of both stages (default 1)")
    parser.add_argument("--num", type=int, default=500, help="number of held-out questions (default 500)")
    parser.add_argument("--bf16", action="store_true", help=BF16_HELP)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the training process")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.threads:
        torch.set_num_threads(args.threads)

    def work() -> int:
        how = {"num": args.num, "scale": args.scale, "bf16": args.bf16}
        done = ablate(args.out, seeds=args.seeds, names=args.variants, minutes=args.minutes, **how)
        print(write_results(args.out, how))
        print(
            f"finished: {args.out}" if done else f"stopped at the time limit; give the same command again ({args.out})"
        )
        return 0

    return run_command("ablate_crosslmm", work)


if __name__ == "__main__":
    sys.exit(main())
