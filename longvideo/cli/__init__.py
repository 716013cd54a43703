"""The command `longvideo`: one module per command, imported only when the command is asked for."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

# Name -> (module in this folder, one line of help): fixed, so that `longvideo --help` imports no command.
COMMANDS = {
    "ask": ("ask", "ask a question about a video"),
    "data": ("data", "check rows for training, or turn them from one format into another"),
    "convert": ("convert", "turn an original checkpoint into a Transformers folder, or back"),
    "estimate": ("estimate", "tokens, memory and FLOPs of a question, before anything is loaded"),
    "train": ("train", "fine-tune a model with the recipe of a training stage"),
    "doctor": ("doctor", "what is installed, what is missing, which decoder and attention are used"),
    "card": ("card", "write the model card of a checkpoint folder"),
    "export-shim": ("export_shim", "write the thin remote-code file for a Hub repository"),
}
EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after the program's name; None takes those of the process.

    Returns:
        The exit code: 0 done, 2 something about the input is wrong (one line on stderr), 1 a fault of the package.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in words if not word.startswith("-")), None)
    try:
        args = build_parser(name if name in COMMANDS else None).parse_args(words)
    except SystemExit as stop:  # argparse has printed its message already
        return EXIT_OK if stop.code in (None, 0) else EXIT_USER
    if args.command is None:
        build_parser(None).print_help(sys.stderr)
        return EXIT_USER
    return run_command(args)


def build_parser(active: str | None) -> argparse.ArgumentParser:
    """Build the parser; only the active command's module is imported and adds its arguments.

    Args:
        active: name of the command in use, or None.

    Returns:
        The parser of the whole program.
    """
    parser = argparse.ArgumentParser(prog="longvideo", description="Ask long videos: load, convert, estimate.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    # Both places of the switch leave the namespace alone when absent: a command's default would undo `--debug ask`.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module_name, summary) in COMMANDS.items():
        description = summary
        module = import_module(f"longvideo.cli.{module_name}") if name == active else None
        if module is not None:
            description = module.HELP
        command = commands.add_parser(name, help=summary, description=description, parents=[common])
        if module is not None:
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    """Print the package's version and those of torch and transformers, read from their metadata."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        import longvideo

        def find(package: str) -> str:
            try:
                return version(package)
            except PackageNotFoundError:
                return "not installed"

        print(f"longvideo {longvideo.__version__} (transformers {find('transformers')}, torch {find('torch')})")
        parser.exit()


def run_command(args: argparse.Namespace) -> int:
    """Run a parsed command and turn errors into one line and an exit code."""
    try:
        return int(args.run(args) or EXIT_OK)
    except KeyboardInterrupt:
        print(f"longvideo {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` for example, has gone
        sys.stderr.close()
        return EXIT_OK
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _report(args, error, EXIT_USER)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _report(args, error, EXIT_USER, hint=" Take fewer frames, a smaller model or --device cpu.")
        hint = "" if args.debug else " Run again with --debug for the traceback."
        return _report(args, error, EXIT_BUG, prefix=f"unexpected {type(error).__name__}: ", hint=hint)


def _report(args: argparse.Namespace, error: BaseException, code: int, *, prefix: str = "", hint: str = "") -> int:
    if args.debug:
        traceback.print_exception(error)
    text = " ".join(_text(error).split()) or type(error).__name__
    print(f"longvideo {args.command}: error: {prefix}{text}{hint}", file=sys.stderr)
    return code


def _text(error: BaseException) -> str:
    # An OSError of the system prints as "[Errno 28] No space left on device: 'x'"; its number says nothing to a user.
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'" if error.filename else error.strerror
    return str(error)
