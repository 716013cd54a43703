"""Joins two models that are named, loaded or callable to a controller."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from longvideo.cross_granularity.controller import CrossGranularityController
from longvideo.cross_granularity.modules import PipelineModule, granularity_modules, has_granularities
from longvideo.cross_granularity.rules import ControllerRules
from longvideo.cross_granularity.trace import Module, ModuleName
from longvideo.pipelines import load_pipeline


def make_controller(
    coarse: Any,
    fine: Any = None,
    rules: ControllerRules | None = None,
    *,
    coarse_options: Mapping[str, Any] | None = None,
    fine_options: Mapping[str, Any] | None = None,
    **load_options: Any,
) -> CrossGranularityController:
    """Join two models, of whatever architectures, to a controller.

    Args:
        coarse: Overview module: folder or Hub id of a model, a pipeline, or a callable that takes a list of
            `ModuleCall` and gives as many texts.
        fine: Detail module, alike; None where `coarse` is a CrossVLLM, which is both.
        rules: How the controller goes on and when it stops.
        coarse_options: Arguments of every call of the overview module: `num_frames`, `max_new_tokens`, `batch_size`.
        fine_options: The same for the detail module.
        **load_options: `device` and `dtype` of models that are named.

    Returns:
        The controller.

    Raises:
        ValueError: One model is given that has no granularities, a model without its processor, or options come with a
            callable.
    """
    given = {"coarse": coarse_options or {}, "fine": fine_options or {}}
    first = load_pipe(coarse, load_options)
    # Equal names are loaded once.
    is_same = fine is None or fine is coarse or (isinstance(fine, str) and fine == coarse)
    second = first if is_same else load_pipe(fine, load_options)
    if fine is None and not has_granularities(first):
        raise ValueError(
            "One model was given for both modules, but it has no granularities. Give a second one for the detail "
            "module, which may be the same, or take a crossvllm model."
        )
    if is_same and has_granularities(first):
        modules = granularity_modules(first, coarse_options=given["coarse"], fine_options=given["fine"])
    else:
        modules = as_module(first, "coarse", given["coarse"]), as_module(second, "fine", given["fine"])
    return CrossGranularityController(*modules, rules)


def load_pipe(model: Any, load_options: Mapping[str, Any]) -> Any:
    """Load a model that is named.

    Args:
        model: Folder or Hub id, pipeline or callable.
        load_options: `device` and `dtype`.

    Returns:
        A pipeline or the callable.

    Raises:
        ValueError: A model came without its processor.
    """
    if isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A {type(model).__name__} came without its processor. Pass "
            "pipeline('video-question-answering', model=model, processor=processor), or the folder of both."
        )
    return model if callable(model) else load_pipeline(model, **load_options)


def as_module(model: Any, name: ModuleName, options: Mapping[str, Any]) -> Module:
    """Make a module from a pipeline.

    Args:
        model: Pipeline, or a callable that is a module already.
        name: Which module.
        options: Arguments of every call.

    Returns:
        The module.

    Raises:
        ValueError: Options came with a callable.
    """
    if not hasattr(model, "processor"):
        if options:
            raise ValueError(
                f"Options {sorted(options)} were given for the {name} module, which is a callable of yours."
            )
        return model
    if has_granularities(model):
        return granularity_modules(model, **{f"{name}_options": options})[name == "fine"]
    return PipelineModule(model, **options)
