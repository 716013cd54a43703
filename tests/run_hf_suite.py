"""Runs the common test classes of a transformers source distribution on an architecture of this package.

    python tests/run_hf_suite.py --factory tests.hf_factories:videochat_flash --hf-tests transformers-5.x/tests
        [--suites model,generation,processor,video] [-k EXPRESSION] [-x] [-n 2] [--json FILE]

`--hf-tests` (or $HF_TESTS_DIR) is the tests folder of the unpacked source distribution, of the version that is
installed. It holds only the `test_*_common.py` files, so what they import beside that is replaced here: the export
tests by nothing, the generation tests by a short class of our own, media addresses by generated files. Nothing is
downloaded. `tests/hf_factories.py` says what a factory returns.
"""

import argparse
import copy
import fnmatch
import importlib
import inspect
import json
import os
import sys
import tempfile
import time
import types
import unittest
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SUITES = ("model", "generation", "processor", "video")
# The distribution's folder is imported under this name, because `tests` is the name of ours.
ALIAS = "hf_common_tests"
NUM_NEW_TOKENS = 6
# Tests that cannot apply to models of a tower and a decoder; the reasons that the suite itself gives are misleading.
COMPOSITE_SKIPS = {
    "test_sdpa_can_dispatch_non_composite_models": "for models without sub-models; the one for composite models runs",
    "test_model_rope_*": "rotary embeddings are those of the text backbone, which transformers tests itself",
    "test_vision_axial_rope": "the towers have no axial rotary embedding",
}


class ExportTests:
    """Stands for torch.export and ONNX tests, which a source distribution does not hold."""


class GenerationTests:
    """Stands for the generation tests, which a source distribution does not hold."""

    def prepare_generation(self) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        """Returns the first generative model, which never stops early, and its inputs without labels."""
        if not self.all_generative_model_classes:
            self.skipTest("no generative class")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.get_text_config(decoder=True).eos_token_id = None
        torch.manual_seed(0)
        model = self.all_generative_model_classes[0](config).eval()
        model.generation_config.eos_token_id = None
        inputs.pop("labels", None)
        return model, inputs

    def test_generate_greedy_matches_no_cache(self) -> None:
        model, inputs = self.prepare_generation()
        options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
        with_cache = model.generate(**inputs, **options)
        without_cache = model.generate(**inputs, **options, use_cache=False)
        self.assertEqual(with_cache.shape[1], inputs["input_ids"].shape[1] + NUM_NEW_TOKENS)
        self.assertEqual(with_cache.tolist(), without_cache.tolist())

    def test_generate_beam(self) -> None:
        model, inputs = self.prepare_generation()
        output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, num_beams=2, do_sample=False)
        self.assertEqual(output.shape, (len(inputs["input_ids"]), inputs["input_ids"].shape[1] + NUM_NEW_TOKENS))

    def test_generate_sample_returns_sequences(self) -> None:
        model, inputs = self.prepare_generation()
        output = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
        self.assertEqual(output.shape[0], 2 * len(inputs["input_ids"]))

    def test_generate_dict_outputs(self) -> None:
        model, inputs = self.prepare_generation()
        wanted = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, **wanted)
        self.assertEqual(len(output.scores), 3)
        self.assertEqual(len(output.hidden_states), 3)

    def test_generate_left_padding(self) -> None:
        model, inputs = self.prepare_generation()
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        pad = model.config.get_text_config(decoder=True).pad_token_id or 0
        padded_ids = torch.cat([ids.new_full((len(ids), 5), pad), ids], dim=1)
        padded_mask = torch.cat([mask.new_zeros((len(ids), 5)), mask], dim=1)
        aligned = {name: torch.nn.functional.pad(x, (5, 0)) for name, x in inputs.items() if x.shape == ids.shape}
        padded = {**inputs, **aligned, "input_ids": padded_ids, "attention_mask": padded_mask}
        position_ids = (padded_mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            plain_logits = model(**{**inputs, "attention_mask": mask}).logits[:, -1]
            padded_logits = model(**padded, position_ids=position_ids).logits[:, -1]
        # float32 sums in another order over the padded length
        torch.testing.assert_close(plain_logits, padded_logits, rtol=1e-4, atol=1e-4)


class SuiteModelTester:
    """The part of transformers' model tester that the model tests read."""

    is_training = True

    def __init__(self, parent: unittest.TestCase, spec: dict) -> None:
        self.parent, self.spec = parent, spec
        config, inputs = spec["config"], spec["inputs_dict"]
        text_config = config.get_text_config(decoder=True)
        self.batch_size, self.seq_length = inputs["input_ids"].shape
        self.num_hidden_layers = text_config.num_hidden_layers
        self.hidden_size = text_config.hidden_size
        self.num_attention_heads = text_config.num_attention_heads
        self.text_config = config.text_config.to_dict()
        self.vision_config = config.vision_config.to_dict()
        if "num_positions" in spec:
            self.encoder_seq_length = spec["num_positions"]

    def get_config(self) -> object:
        """Returns a copy of the factory's configuration."""
        return copy.deepcopy(self.spec["config"])

    def prepare_config_and_inputs_for_common(self) -> tuple[object, dict]:
        """Returns copies of the factory's configuration and inputs."""
        return self.get_config(), copy.deepcopy(self.spec["inputs_dict"])


def add_module(name: str, **attributes: object) -> types.ModuleType:
    """Puts a module with the given attributes where imports find it."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def local_medium(address: str) -> str:
    """Returns the path of a generated stand-in for a test medium, chosen by the file name of its address."""
    import numpy as np

    folder = Path(tempfile.gettempdir()) / "longvideo_hf_suite_media"
    folder.mkdir(exist_ok=True)
    path = folder / address.rsplit("/", 1)[-1]
    if path.exists():
        return str(path)
    partial = path.with_name(f"{os.getpid()}_{path.name}")
    if path.suffix in (".png", ".jpg"):
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(partial)
    elif path.suffix == ".mp4":
        from tests.videos import make_video

        make_video(partial, num_frames=11 if "tiny" in path.name else 300, fps=30, size=(320, 240))
    else:
        partial.write_bytes(b"")
    os.replace(partial, path)
    return str(path)


def load_common_tests(tests_dir: Path, needs_torchcodec: bool) -> None:
    """Makes the common test modules importable under the alias, with stand-ins for what a distribution lacks."""
    import transformers.testing_utils

    if not needs_torchcodec:
        transformers.testing_utils.require_torchcodec = lambda test: test
    add_module(ALIAS).__path__ = [str(tests_dir)]
    for folder in ("exporters", "generation", "utils"):
        if not (tests_dir / folder).is_dir():
            add_module(f"{ALIAS}.{folder}").__path__ = []
    add_module(f"{ALIAS}.exporters.test_export", ExportTesterMixin=ExportTests)
    if not (tests_dir / "generation" / "test_utils.py").exists():
        add_module(f"{ALIAS}.generation.test_utils", GenerationTesterMixin=GenerationTests)
    add_module(f"{ALIAS}.utils.test_configuration_utils", config_common_kwargs={})
    add_module("fetch_hub_objects_for_ci", url_to_local_path=local_medium)


def build_suites(spec: dict, tests_dir: Path, suites: list[str]) -> dict[str, type]:
    """Returns the test classes of an architecture.

    Args:
        spec: What a factory returns.
        tests_dir: Tests folder of the source distribution.
        suites: Names out of `SUITES`.

    Returns:
        Test classes by name.
    """
    load_common_tests(tests_dir, spec.get("needs_torchcodec", True))
    classes = {}
    if "model" in suites or "generation" in suites:
        classes["ModelTest"] = build_model_tests(spec, suites)
    if "processor" in spec and "processor" in suites:
        classes["ProcessorTest"] = build_processor_tests(spec)
    if "processor" in spec and "video" in suites:
        classes["VideoProcessorTest"] = build_video_processor_tests(spec)
    for test_class in classes.values():
        test_class.__module__ = __name__
        for name, value in spec.get("overrides", {}).items():
            setattr(test_class, name, value)
        for pattern, reason in {**COMPOSITE_SKIPS, **spec.get("skip", {})}.items():
            for name in fnmatch.filter(list_tests(test_class), pattern):
                setattr(test_class, name, unittest.skip(reason)(lambda self: None))
    return classes


def list_tests(test_class: type) -> list[str]:
    """Returns the tests of a class; a parameterized test leaves an attribute of its name that is none."""
    return [name for name in dir(test_class) if name.startswith("test_") and callable(getattr(test_class, name))]


def build_model_tests(spec: dict, suites: list[str]) -> type:
    """Returns the model tests, the generation tests or both as one class."""
    generation = importlib.import_module(f"{ALIAS}.generation.test_utils").GenerationTesterMixin
    common = importlib.import_module(f"{ALIAS}.test_modeling_common").ModelTesterMixin

    def set_up(self: unittest.TestCase) -> None:
        self.model_tester = SuiteModelTester(self, spec)
        if self._testMethodName.startswith("test_training"):
            # A bare model has no loss; the common tests know that of in-tree classes only, by name.
            self.all_model_classes = tuple(cls for cls in type(self).all_model_classes if takes_labels(cls))

    def prepare_for_class(
        self: unittest.TestCase, inputs: dict, model_class: type, return_labels: bool = False
    ) -> dict:
        inputs = copy.deepcopy(inputs)
        if return_labels and takes_labels(model_class):
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    body = {
        "setUp": set_up,
        "_prepare_for_class": prepare_for_class,
        "_is_composite": True,
        # Our files have no copyright year, by which the suite skips old models.
        "test_can_init_all_missing_weights_before_2023": True,
        # These compare with the tower's batch, which holds clips here, not videos or images.
        "skip_test_video_features_output_shape": True,
        "skip_test_image_features_output_shape": True,
        "all_model_classes": tuple(spec["model_classes"]),
        "all_generative_model_classes": tuple(cls for cls in spec["model_classes"] if cls.can_generate()),
    }
    if "generation" not in suites:
        body |= {name: None for name in dir(generation) if name.startswith("test_")}
    bases = (common, generation) if "model" in suites else (generation,)
    return type("ModelTest", (*bases, unittest.TestCase), body)


def takes_labels(model_class: type) -> bool:
    """Says whether a model computes a loss."""
    return "labels" in inspect.signature(model_class.forward).parameters


def build_processor_tests(spec: dict) -> type:
    """Returns the processor tests; every test class asks the factory for fresh components."""
    mixin = importlib.import_module(f"{ALIAS}.test_processing_common").ProcessorTesterMixin
    make = spec["processor"]
    processor = make()
    parts = type(processor).get_attributes()
    own = [
        name
        for name in inspect.signature(type(processor).__init__).parameters
        if name not in ("self", "kwargs", *parts)
    ]

    def prepare_processor_dict() -> dict:
        return {name: getattr(processor, name) for name in own if hasattr(processor, name)}

    body = {
        "processor_class": type(processor),
        "prepare_processor_dict": staticmethod(prepare_processor_dict),
        **spec.get("max_lengths", {}),
    }
    for part in parts:
        body[f"_setup_{part}"] = classmethod(lambda cls, part=part: getattr(make(), part))
    return type("ProcessorTest", (mixin, unittest.TestCase), body)


def build_video_processor_tests(spec: dict) -> type:
    """Returns the video processor tests, on five videos of eight frames with sides of 30 to 80 pixels."""
    common = importlib.import_module(f"{ALIAS}.test_video_processing_common")
    settings = {
        "do_resize": True,
        "size": {"shortest_edge": 20},
        "do_center_crop": True,
        "crop_size": {"height": 18, "width": 18},
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "do_sample_frames": False,
    }

    class VideoProcessingTester:
        batch_size, num_frames, num_channels = 5, 8, 3

        def prepare_video_inputs(self, equal_resolution: bool = False, return_tensors: str = "pil") -> list:
            return common.prepare_video_inputs(
                self.batch_size, self.num_frames, self.num_channels, 30, 80, equal_resolution, return_tensors
            )

        def expected_output_video_shape(self, videos: list) -> list[int]:
            return [self.num_frames, self.num_channels, 18, 18]

    def set_up(self: unittest.TestCase) -> None:
        common.VideoProcessingTestMixin.setUp(self)
        self.video_processor_tester = VideoProcessingTester()

    body = {
        "setUp": set_up,
        "fast_video_processing_class": type(spec["processor"]().video_processor),
        "video_processor_dict": {**settings, **spec.get("video_processor_dict", {})},
    }
    return type("VideoProcessorTest", (common.VideoProcessingTestMixin, unittest.TestCase), body)


def load_spec(reference: str) -> dict:
    """Returns what the factory `module:function` returns."""
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(module), function)()


class Report:
    """Collects one row per test; a test whose subtests failed counts once, as failed."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.subtest_failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: object) -> None:
        """Keeps the outcome of a test, or the first failure among its subtests."""
        if hasattr(report, "context"):
            if report.outcome == "failed":
                self.subtest_failures.setdefault(report.nodeid, last_line(report.longrepr))
            return
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        outcome, reason = report.outcome, ""
        if report.nodeid in self.subtest_failures:
            outcome, reason = "failed", self.subtest_failures[report.nodeid]
        elif outcome == "failed":
            reason = last_line(report.longrepr)
        elif outcome == "skipped":
            reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        test = report.nodeid.split("::", 1)[-1]
        self.rows.append({"test": test, "outcome": outcome, "seconds": round(report.duration, 2), "reason": reason})

    def print_summary(self, show_skipped: bool) -> None:
        """Prints counts per test class and every failure."""
        for name in dict.fromkeys(row["test"].split("::")[0] for row in self.rows):
            outcomes = [row["outcome"] for row in self.rows if row["test"].startswith(f"{name}::")]
            counts = "  ".join(f"{outcome} {outcomes.count(outcome)}" for outcome in ("passed", "failed", "skipped"))
            print(f"{name:20s} {counts}")
        for row in self.rows:
            if row["outcome"] == "failed" or (show_skipped and row["outcome"] == "skipped"):
                print(f"{row['outcome'].upper()} {row['test']} | {row['reason']}")


def last_line(longrepr: object) -> str:
    """Returns the last line of a failure's text, which names the error."""
    return str(longrepr).strip().splitlines()[-1][:300]


def main() -> int:
    """Runs the suites in this process (or `-n` processes) and returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factory", required=True, help="module:function")
    parser.add_argument("--hf-tests", default=os.environ.get("HF_TESTS_DIR"), help="tests folder of the distribution")
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("-k", metavar="EXPRESSION", help="only these tests")
    parser.add_argument("-x", action="store_true", help="stop at the first failure")
    parser.add_argument("-n", metavar="PROCESSES", help="processes (pytest-xdist)")
    parser.add_argument("--skipped", action="store_true", help="list skipped tests with their reasons")
    parser.add_argument("--json", metavar="FILE", help="write every test's outcome there")
    args = parser.parse_args()
    if not args.hf_tests or not (Path(args.hf_tests) / "test_modeling_common.py").exists():
        parser.error(
            f"no test_modeling_common.py in {args.hf_tests}; point --hf-tests (or HF_TESTS_DIR) at the tests folder "
            "of an unpacked transformers source distribution"
        )
    os.environ.update(HF_SUITE_FACTORY=args.factory, HF_TESTS_DIR=args.hf_tests, HF_SUITES=args.suites)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import pytest

    # Neither our conftest nor the settings of pyproject.toml: the suite has markers and fixtures of its own.
    options = [
        "-q",
        "--no-header",
        "--tb=line",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-c",
        os.devnull,
    ]
    options += ["--rootdir", str(REPOSITORY)]
    options += ["-k", args.k] if args.k else []
    options += ["-x"] if args.x else []
    options += ["-n", args.n] if args.n else []
    report, start = Report(), time.time()
    status = pytest.main([__file__, *options], plugins=[report])
    print(f"\n== {args.factory}, {time.time() - start:.0f} s")
    report.print_summary(args.skipped)
    if args.json:
        Path(args.json).write_text(json.dumps({"factory": args.factory, "tests": report.rows}, indent=1))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
elif os.environ.get("HF_SUITE_FACTORY"):  # collected by the pytest that main started
    globals().update(
        build_suites(
            load_spec(os.environ["HF_SUITE_FACTORY"]),
            Path(os.environ["HF_TESTS_DIR"]),
            os.environ["HF_SUITES"].split(","),
        )
    )
