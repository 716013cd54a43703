"""Where frames come from: local files, addresses that must be downloaded, and pictures that stand for frames."""

import contextlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
from PIL import Image, UnidentifiedImageError

PICTURE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VideoSource = str | os.PathLike | Sequence[str | os.PathLike]


def is_remote(source: object) -> bool:
    """Say whether a source must be fetched first: an http(s) address, or a data URI, which holds a file as text.

    Args:
        source: Anything a caller passed as a video.

    Returns:
        True for strings that begin with http://, https:// or data:.
    """
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://", "data:"))


def local_path(source: str | os.PathLike) -> Path:
    """Turn a path or a file:// address into an existing path.

    Args:
        source: Path, or address with the file scheme.

    Returns:
        The path of an existing file or folder.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    if isinstance(source, str) and source.lower().startswith("file://"):
        source = urllib.request.url2pathname(unquote(urlparse(source).path))
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"No such video file or folder: {path}. Check the path and the working directory.")
    return path


@contextlib.contextmanager
def downloaded(address: str, *, timeout: float = 30.0) -> Iterator[Path]:
    """Fetch an http(s) address or a data URI to a temporary file that is removed afterwards.

    Args:
        address: The http(s) address, or `data:video/mp4;base64,...`.
        timeout: Seconds without an answer before giving up.

    Yields:
        Path of the temporary file, with the suffix of the address.

    Raises:
        OSError: The address does not answer, answers with an error, or the connection ends early.
    """
    if address[:5].lower() == "data:":
        # The kind of the file stands in front: data:video/mp4;base64,...
        suffix, shown = "." + re.split("[;,]", address[:64], maxsplit=1)[0].rpartition("/")[2], f"{address[:40]}..."
    else:
        suffix, shown = Path(unquote(urlparse(address).path)).suffix, address
    handle, name = tempfile.mkstemp(prefix="longvideo_", suffix=suffix[:10])
    try:
        with os.fdopen(handle, "wb") as file:
            request = urllib.request.Request(address, headers={"User-Agent": "longvideo"})
            with _opened(request, timeout) as answer:
                shutil.copyfileobj(answer, file)
                expected = answer.headers.get("Content-Length")
                received = file.tell()
        if expected is not None and received != int(expected):
            raise OSError(f"The download of {shown} ended after {received} of {expected} bytes. Try again.")
        yield Path(name)
    except urllib.error.HTTPError as error:
        raise OSError(f"The video {shown} could not be downloaded: the server said {error.code}.") from error
    except urllib.error.URLError as error:
        raise OSError(f"The video {shown} could not be downloaded: {error.reason}.") from error
    except TimeoutError as error:
        raise OSError(f"The video {shown} could not be downloaded: no answer for {timeout:g} s.") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _opened(request: urllib.request.Request, timeout: float) -> contextlib.AbstractContextManager:
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except ValueError as error:  # what stands in a data URI is no base64
        raise OSError(f"The video {request.full_url[:40]}... holds no file: {error}.") from error


def list_pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder in the order of the last number in their names.

    Args:
        folder: Folder with one picture per frame.

    Returns:
        Paths, ascending by number; names without a number come last, by name.

    Raises:
        ValueError: The folder holds no pictures.

    Source: VideoChat-Flash frame folders (names sorted by the number before the extension).
    """
    pictures = [entry for entry in folder.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES and entry.is_file()]
    if not pictures:
        raise ValueError(
            f"The folder {folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}). Pass a video file, or a "
            "folder with one picture per frame."
        )

    def order(path: Path) -> tuple[float, str]:
        numbers = re.findall(r"\d+", path.stem)
        return (float(numbers[-1]) if numbers else float("inf"), path.name)

    return sorted(pictures, key=order)


def read_picture(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Read one picture as RGB.

    Args:
        path: Picture file.
        size: (height, width) in pixels to resize to, or None.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not a picture that can be read.
    """
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"No such frame picture: {path}.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"The frame {path} is not a picture that can be read: {error}.") from error
    return resize_rgb(np.asarray(rgb), size)


def resize_rgb(frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize an RGB frame the way the original processors do.

    Args:
        frame: (height, width, 3) uint8 RGB.
        size: (height, width) in pixels, or None to keep the frame.

    Returns:
        (height, width, 3) uint8 RGB, PIL bicubic, aspect ratio not kept.
    """
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))
