"""`longvideo estimate VIDEO | --frames N`: what a question costs, counted from the configuration alone."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HELP = (
    "Count tokens, memory and FLOPs of a question about a video before anything is loaded: only the configuration of "
    "the model and the header of the video are read."
)
DEFAULT_MODEL = "videochat_flash-7b-448"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: The command's parser.
    """
    parser.add_argument("video", metavar="VIDEO", nargs="?", help="video file, URL or folder of pictures")
    parser.add_argument(
        "--model",
        metavar="PATH_OR_NAME",
        default=DEFAULT_MODEL,
        help="folder with a config.json, Hub id, or a published size: videochat_flash-7b-448, -7b-224, -2b-448, "
        "-internvideo2, longvu-7b, -3b, -1b, each also with -img, llava_st-7b, crosslmm-2b, -7b, -7b-16, crossvllm-7b "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    frames = parser.add_argument_group("frames")
    frames.add_argument("--frames", "--num-frames", dest="frames", type=int, metavar="N", help="exactly N frames")
    frames.add_argument("--fps", type=float, metavar="X", help="X frames per second of the video")
    frames.add_argument("--min-frames", type=int, metavar="N", help="at least N frames of the video")
    frames.add_argument("--max-frames", type=int, metavar="N", help="at most N frames of the video")
    frames.add_argument("--start", type=float, metavar="SECONDS", help="leave out what comes before")
    frames.add_argument("--end", type=float, metavar="SECONDS", help="leave out what comes after")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--dropout",
        "--visual-dropout",
        dest="dropout",
        metavar="on|off|TYPE:LAYERS:RATIOS",
        help="dropping of visual tokens inside the language model, for example uniform0_attention:4,18:1,0.75,0.25 "
        "(default: as the configuration says)",
    )
    model.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of weights and cache")
    model.add_argument("--text-tokens", type=int, default=64, metavar="N", help="tokens of prompt text (default: 64)")
    model.add_argument(
        "--new-tokens", type=int, default=256, metavar="N", help="tokens of the answer, for the limit (default: 256)"
    )


def run(args: argparse.Namespace) -> int:
    """Count and print.

    Args:
        args: The parsed arguments.

    Returns:
        0.

    Raises:
        ValueError: The arguments contradict each other, or the model or the video cannot be counted.
        OSError: The model or the video cannot be found.
    """
    check_arguments(args)
    from longvideo.cli.ask import parse_visual_dropout
    from longvideo.evaluation.cost import counter_of

    config, folder = load_config(args.model)
    counter = counter_of(config)
    num_frames, video, options = choose_num_frames(args, config, folder)
    counts = counter.estimate(
        config,
        num_frames,
        num_text=args.text_tokens,
        new_tokens=args.new_tokens,
        visual_dropout=parse_visual_dropout(args.dropout),
        dtype=args.dtype,
        **options,
    )
    warning = counter.warn(config, counts, args.new_tokens)
    if args.json:
        print(json.dumps({"model": args.model, "dtype": args.dtype, "video": video, "warning": warning,
                          **counts.to_dict()}, indent=2))  # fmt: skip
        return 0
    rows = [("model", f"{args.model}, {counts.parameters['total']:,} weights, {args.dtype}")]
    if video is not None:
        size = f"{video['width']}x{video['height']}"
        rows.append(("video", f"{video['duration']:.2f} s, {video['frames']:,} frames, {size}"))
    rows += counter.describe(config, counts)
    print("\n".join(f"{name:<18}{text}" for name, text in rows))
    if warning:
        print(f"\nwarning: {warning}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work.

    Args:
        args: The parsed arguments.

    Raises:
        ValueError: With the argument and what it should be.
    """
    if args.video is None and args.frames is None:
        raise ValueError("Give a VIDEO or --frames N, so that frames can be counted.")
    if args.video is None:
        given = [
            name for name in ("fps", "min_frames", "max_frames", "start", "end") if getattr(args, name) is not None
        ]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} needs a VIDEO; without one only --frames counts.")
    for name, least in (("frames", 1), ("text_tokens", 0), ("new_tokens", 0), ("min_frames", 1), ("max_frames", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {least}.")


def load_config(name: str) -> tuple["PreTrainedConfig", Path | None]:
    """Find the configuration of a model; no weights are read.

    Args:
        name: Published size, folder with a config.json in the Transformers or the original layout, or Hub id.

    Returns:
        The configuration, and the local folder when the model is one.

    Raises:
        ValueError: The name is unknown or the configuration is of another architecture.
        OSError: config.json cannot be found.
    """
    from transformers import CONFIG_MAPPING

    from longvideo.conversion.base import find_conversion
    from longvideo.evaluation.cost import COUNTERS
    from longvideo.evaluation.presets import PRESETS, find_preset

    preset, folder = find_preset(name), Path(name).expanduser()
    if preset is not None and not folder.is_dir():
        return preset.config(), None
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"The folder {folder} holds no config.json; expected a checkpoint folder.")
    else:
        path = download_config(name, known=", ".join(PRESETS))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no configuration; expected a JSON object.")
    folder = folder if folder.is_dir() else None
    if content.get("model_type") in COUNTERS:
        return CONFIG_MAPPING[content["model_type"]].from_dict(content), folder
    conversion = find_conversion(content)
    conversion.check_config(content)
    return conversion.build_config(content), folder


def download_config(name: str, *, known: str) -> Path:
    """Fetch the configuration of a Hub repository, and nothing else.

    Args:
        name: Hub id.
        known: Published sizes, for the error.

    Returns:
        Path of config.json in the local cache.

    Raises:
        ValueError: The name cannot be a Hub id.
        OSError: The Hub cannot be reached or has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"Unknown model {name!r}: expected a folder, a Hub id (owner/name), or one of {known}.")
    try:
        return Path(hf_hub_download(name, "config.json"))
    except HFValidationError as error:
        raise ValueError(f"Unknown model {name!r}: neither a folder nor a Hub id ({error}).") from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"The Hub cannot be reached for the config.json of {name}; give a folder or one of {known}."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"The Hub gives no config.json for {name} ({str(error).splitlines()[0]}).") from error


def choose_num_frames(
    args: argparse.Namespace, config: "PreTrainedConfig", folder: Path | None
) -> tuple[int, dict[str, Any] | None, dict[str, Any]]:
    """Count the frames as the processor would choose them.

    Args:
        args: The parsed arguments.
        config: Model configuration.
        folder: Checkpoint folder whose processor settings count, or None for the defaults.

    Returns:
        Number of frames, the facts of the video or None, and what else of it counts.
    """
    from longvideo.evaluation.cost import counter_of
    from longvideo.processing.shared.video_io import describe_video

    counter = counter_of(config)
    if args.video is None:
        return counter.usable_frames(config, args.frames), None, {}
    processor = load_video_processor(config, folder)
    metadata = describe_video(args.video, start=args.start, end=args.end)
    wishes = {
        "num_frames": args.frames,
        "fps": args.fps,
        "min_frames": args.min_frames,
        "max_frames": args.max_frames,
        **counter.processor_options(config),
    }
    indices = processor.choose_frames(metadata, processor.sampling_rule({}, wishes))
    facts = {
        "path": str(args.video),
        "duration": metadata.duration,
        "fps": metadata.fps,
        "frames": metadata.total_num_frames,
        "width": metadata.width,
        "height": metadata.height,
    }
    return len(indices), facts, counter.video_options(processor, args.video, metadata)


def load_video_processor(config: "PreTrainedConfig", folder: Path | None) -> Any:
    """Make the video processor of an architecture.

    Args:
        config: Model configuration.
        folder: Checkpoint folder whose processor settings count, or None for the defaults.

    Returns:
        The processor.
    """
    from longvideo.cli.export_shim import registered_classes

    processor_class = dict(registered_classes(config.model_type))["AutoVideoProcessor"]
    files = ("processor_config.json", "video_preprocessor_config.json")
    if folder is not None and any((folder / name).is_file() for name in files):
        return processor_class.from_pretrained(folder)
    return processor_class()
