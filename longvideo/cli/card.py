"""`longvideo card DIR`: writes the model card of a checkpoint folder."""

import argparse
import os
import sys
from pathlib import Path

HELP = "write the model card of a checkpoint folder"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder of a saved or converted checkpoint")
    parser.add_argument("--out", metavar="FILE", help="where to write the card; - prints it (default: DIR/README.md)")
    parser.add_argument(
        "--base-model", metavar="OWNER/NAME", help="Hub name of the weights this checkpoint comes from"
    )
    parser.add_argument("--license", metavar="ID", help="licence of the weights, for example apache-2.0")
    parser.add_argument(
        "--repo-id", metavar="OWNER/NAME", help="name used in the card's examples (default: DIR's name)"
    )
    parser.add_argument(
        "--measured", metavar="FILE", help="JSON file with measured figures (default: DIR/measured.json)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite a card that was not rendered by this command")


def run(args: argparse.Namespace) -> int:
    """Renders and writes the card.

    Raises:
        ValueError: there is a hand-written file in the way, or the folder is not one that a card can be rendered for.
    """
    from longvideo.hub_cards.render import MARKER, read_json, render_card

    measured = None
    if args.measured:
        measured = read_json(Path(args.measured))
        if measured is None:
            raise FileNotFoundError(
                f"{args.measured}: no such file; --measured expects a JSON file with measured figures."
            )
    card = render_card(
        args.folder, base_model=args.base_model, license=args.license, repo_id=args.repo_id, measured=measured
    )
    if args.out == "-":
        sys.stdout.write(card)
        return 0
    target = Path(args.out) if args.out else Path(args.folder) / "README.md"
    if target.is_file() and not args.force and MARKER not in target.read_text(encoding="utf-8"):
        raise ValueError(
            f"{target} was not rendered by this command; pass --force to overwrite it or --out to write elsewhere."
        )
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(card, encoding="utf-8")
    os.replace(partial, target)
    print(target)
    for key, option in (("base_model", "--base-model"), ("license", "--license")):
        if f"\n{key}:" not in card:
            print(f"note: the card has no {key}; give it with {option}.", file=sys.stderr)
    return 0
