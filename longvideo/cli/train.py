"""`longvideo train RECIPE`: fine-tune a model with the settings of a recipe, or say beforehand what that takes."""

import argparse

from longvideo.cli.train_plan import DTYPES

HELP = (
    "Fine-tune a model on your rows with the settings of a training stage: RECIPE is an architecture and a stage as "
    "longvu/stage2_video, or your own yaml file. --dry-run says what learns, how many tokens a step has and how much "
    "memory it takes, without loading weights."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: The command's parser.
    """
    parser.add_argument(
        "recipe", metavar="RECIPE", help="architecture/stage, an architecture with --stage, or a yaml file"
    )
    parser.add_argument("--stage", metavar="N", help="name of the stage, or its number")
    parser.add_argument("--model", metavar="DIR_OR_ID", required=True,
                        help="checkpoint folder, Hub id, or architecture with a tiny checkpoint in the package; "
                        "with --dry-run also a published size as longvideo estimate knows them")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="where checkpoints and the result go (default: outputs/STAGE)")
    parser.add_argument("--dry-run", action="store_true", help="count and print; nothing is trained or written")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in --output")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE", nargs="+", default=[], help="files of rows, in any format that "
                      "`longvideo data check` knows")  # fmt: skip
    data.add_argument("--format", metavar="NAME", help="format of the rows (default: found out)")
    data.add_argument("--media-root", metavar="DIR", help="folder that videos are named from (default: of each file)")
    data.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="what bad rows do (default: raise)"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting in place of the recipe's, e.g. max_steps=100; model.KEY of the model's configuration, "
        "lora.KEY of the adapter; may be repeated",
    )
    training.add_argument("--dpo", action="store_true", help="learn preferences: rows with prompt, chosen, rejected")
    training.add_argument("--lora", action="store_true", help="train an adapter in place of the language model")
    training.add_argument("--merged", action="store_true", help="save the model with its adapter merged into it")
    training.add_argument("--merge-adapter", metavar="DIR", action="append", default=[],
                          help="merge the adapter of an earlier stage first; may be repeated")  # fmt: skip
    training.add_argument("--dtype", choices=list(DTYPES), help="type of the weights (default: fp32; bf16 under an "
                          "adapter on a GPU)")  # fmt: skip
    training.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu keeps off the GPU")


def run(args: argparse.Namespace) -> int:
    """Plan, then print the plan or train.

    Args:
        args: The parsed arguments.

    Returns:
        0.

    Raises:
        ValueError: Arguments, recipe, model or rows that do not fit each other.
        OSError: A file or folder that cannot be found or written.
        ImportError: A package of the extra `train` is missing.
    """
    from longvideo.cli.train_plan import make_plan
    from longvideo.cli.train_run import describe, train

    if not args.data and not args.dry_run:
        raise ValueError("Give --data FILE, or --dry-run to see what the stage takes without data.")
    plan = make_plan(args)
    if args.dry_run:
        print("\n".join(f"{name:<18}{text}" for name, text in describe(plan, args)))
        return 0
    folder = train(plan, args)
    print(f"{folder}: load it with from_pretrained, or go on with the next stage")
    return 0
