"""`longvideo convert SRC DST`: original checkpoint layout to Transformers layout, and back."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

HELP = "convert an original checkpoint folder into a Transformers folder, or back"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: The command's parser.
    """
    parser.add_argument("source", metavar="SRC", help="folder with config.json and weights (safetensors or .bin)")
    parser.add_argument("destination", metavar="DST", help="folder to create; it appears only when all went well")
    parser.add_argument(
        "--dtype", choices=["keep", "bf16", "fp16", "fp32"], default="keep", help="cast the weights (default: keep)"
    )
    parser.add_argument(
        "--model-type", default="auto", help="architecture to insist on when config.json names another (default: auto)"
    )
    parser.add_argument(
        "--vision-tower", metavar="DIR", help="LongVU: folder of the SigLIP tower (default: SRC/towers/siglip)"
    )
    parser.add_argument(
        "--dino-tower", metavar="DIR", help="LongVU: folder of the DINOv2 tower (default: SRC/towers/dinov2)"
    )
    parser.add_argument(
        "--coordinates",
        choices=["folded", "split", "none"],
        help="LLaVA-ST: rows of coordinates in embedding and head, in tables of their own, or none in a model of "
        "stage 1 (default: folded)",
    )
    parser.add_argument(
        "--lora-stages",
        metavar="DIR",
        nargs="+",
        help="LLaVA-ST: folders of later stages to merge into the stage-1 model SRC, in their order",
    )
    parser.add_argument("--reverse", action="store_true", help="write a converted folder back in the original layout")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists, at the end")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file in GB (default: 5)")
    parser.add_argument("--sha256", action="store_true", help="record the SHA-256 of the source's weight files")
    parser.add_argument("--no-card", action="store_true", help="do not write a model card")
    parser.add_argument("--quiet", action="store_true", help="print only the result, without table and progress bar")


def run(args: argparse.Namespace) -> int:
    """Convert and print the report.

    Args:
        args: The parsed arguments.

    Returns:
        0 when every tensor was used or named as dropped and every place was filled.

    Raises:
        ValueError: if something does not fit; nothing was written then.
        OSError: if a file is missing or cannot be written; the destination is untouched then.
    """
    from longvideo.conversion import convert_checkpoint, reverse_checkpoint

    if args.max_shard_gb <= 0:
        raise ValueError(f"--max-shard-gb is {args.max_shard_gb}; expected more than 0.")
    common: dict[str, Any] = {
        "dtype": args.dtype,
        "overwrite": args.overwrite,
        "max_shard_bytes": int(args.max_shard_gb * 1e9),
        "sha256": args.sha256,
        "progress": not args.quiet,
    }
    parts = {"vision_tower": args.vision_tower, "dino_tower": args.dino_tower}
    options = {"coordinates": args.coordinates, "lora_stages": tuple(args.lora_stages or ())}
    if args.reverse:
        if any(options.values()):
            raise ValueError("--coordinates and --lora-stages have no meaning with --reverse: there is one original.")
        if any(parts.values()):
            raise ValueError("--vision-tower and --dino-tower have no meaning with --reverse: SRC holds the towers.")
        if args.model_type != "auto":
            raise ValueError("--model-type has no meaning with --reverse: the folder's config.json says what it is.")
        report = reverse_checkpoint(args.source, args.destination, **common)
    else:
        report = convert_checkpoint(
            args.source,
            args.destination,
            model_type=args.model_type,
            parts=parts,
            options=options,
            decorate=None if args.no_card else partial(write_card, name=Path(args.destination).name),
            **common,
        )
    print(report.result() if args.quiet else report.summary())
    print(f"wrote {args.destination}")
    return 0


def write_card(folder: Path, report: dict[str, Any], *, name: str) -> None:
    """Write the model card of a freshly converted folder.

    Args:
        folder: The folder with config and report in place.
        report: Content of conversion_report.json.
        name: The name that the folder will have.
    """
    from longvideo.hub_cards.render import render_card

    (folder / "README.md").write_text(render_card(folder, repo_id=name), encoding="utf-8")
