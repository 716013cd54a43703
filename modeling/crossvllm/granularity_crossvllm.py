"""The two granularities of a CrossVLLM: one switch for LoRA adapter, projector and pooling stride.

Paper: Cross-granularity video LLM for long video understanding, Sec. 3 and 4. Original code: none is public.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longvideo.modeling.crossvllm.adapters_crossvllm import (
    activate_adapter,
    copy_adapter,
    inject_adapter,
    keep_requires_grad,
    new_lora_config,
)
from longvideo.modeling.crossvllm.configuration_crossvllm import GRANULARITIES


class CrossVLLMGranularityMixin:
    """Switching between granularities, alike for the bare model and the one with a head.

    The bare model holds the state: `_granularity`, the active one, and `_references`, frozen copies of a granularity
    by name.
    """

    @property
    def granularity(self) -> str:
        """Name of the active granularity: "coarse", "fine" or that of a reference."""
        return self.base_model._granularity

    @property
    def granularities(self) -> tuple[str, ...]:
        """All names that can be switched to."""
        return (*GRANULARITIES, *self.base_model._references)

    @property
    def granularity_kind(self) -> str:
        """ "coarse" or "fine": what decides the pooling stride, for a reference that of what it is a copy of."""
        return self.base_model._references.get(self.granularity, self.granularity)

    @property
    def has_adapters(self) -> bool:
        """Whether the granularities have LoRA adapters."""
        return set(GRANULARITIES) <= set(getattr(self.base_model, "_adapter_names", ()))

    def _check_name(self, granularity: str) -> None:
        if granularity not in self.granularities:
            raise ValueError(f"granularity is {granularity!r}; choose one of {self.granularities}.")

    def set_granularity(self, granularity: str) -> None:
        """Switches LoRA adapter, projector and pooling stride at once; what may learn stays as it is.

        Args:
            granularity: "coarse", "fine" or the name of a reference.

        Raises:
            ValueError: another name.

        Source: CrossVLLM, Sec. 3.1: coarse module C with projector f, fine module F with projector f'.
        """
        self._check_name(granularity)
        core = self.base_model
        if granularity == core._granularity:
            return
        if self.has_adapters:
            activate_adapter(core.language_model, granularity)
        core._granularity = granularity

    @contextmanager
    def use_granularity(self, granularity: str | None = None) -> Iterator[None]:
        """Switches for the length of a `with` block.

        Args:
            granularity: see `set_granularity`; None switches nothing.

        Raises:
            ValueError: another name.
        """
        before = self.granularity
        if granularity is not None:
            self.set_granularity(granularity)
        try:
            yield
        finally:
            self.set_granularity(before)

    def set_adapter(self, adapter_name: str) -> None:
        """Switches as `set_granularity` does and, as upstream, lets the adapter's weights learn and no other's.

        Args:
            adapter_name: name of a granularity or a reference.

        Raises:
            ValueError: another name, or a model without adapters.
        """
        super().set_adapter(adapter_name)
        if adapter_name in self.granularities:
            self.base_model._granularity = adapter_name

    def set_trainable(self, *granularities: str) -> None:
        """Lets projector and adapter of some granularities learn, and those of the others not.

        Everything else (tower, decoder, head) keeps what it has. An optimizer that shall train both granularities in
        turn is made while both learn.

        Args:
            *granularities: names; none freezes all.

        Raises:
            ValueError: another name.
        """
        for name in granularities:
            self._check_name(name)
        for parameter_name, parameter in self.base_model.named_parameters():
            owner = self._owner(parameter_name)
            if owner is not None:
                parameter.requires_grad_(owner in granularities)

    def _owner(self, parameter_name: str) -> str | None:
        """Returns the granularity that a parameter of the bare model belongs to, None for shared ones."""
        parts = parameter_name.split(".")
        for name in self.granularities:
            if parts[:2] == ["projectors", name] or (name in parts and any(x.startswith("lora_") for x in parts)):
                return name
        return None

    def granularity_parameters(self, granularity: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields names and parameters of a granularity's projector and adapter, e.g. for a parameter group.

        Args:
            granularity: name of a granularity or a reference.

        Raises:
            ValueError: another name.
        """
        self._check_name(granularity)
        for name, parameter in self.base_model.named_parameters():
            if self._owner(name) == granularity:
                yield name, parameter

    def add_adapters(self, **lora: object) -> None:
        """Gives every granularity a fresh LoRA adapter; no output changes. Decoder and head are frozen.

        Args:
            **lora: fields of `peft.LoraConfig` in place of those that the configuration gives: rank, alpha, dropout,
                and all linear layers of the decoder.

        Raises:
            ImportError: peft is not installed.
            ValueError: the model has adapters already.

        Differs: the paper prints neither rank nor targets; 8, 32, 0.05 and all linear layers are our choice.
        """
        if self.has_adapters:
            raise ValueError("The model has adapters already. Switch between them with set_granularity.")
        settings = new_lora_config(self, **lora)
        for name in GRANULARITIES:
            inject_adapter(self, copy.deepcopy(settings), name)
        self._finish_adapters()

    def _finish_adapters(self) -> None:
        """Takes injected adapters into use: both granularities learn, everything else is frozen."""
        core = self.base_model
        core._adapter_names = GRANULARITIES
        activate_adapter(core.language_model, core._granularity)
        self.requires_grad_(False)
        self.set_trainable(*GRANULARITIES)
        self.config.adapters = True

    def begin_coarse(self) -> None:
        """Gets ready for supervised finetuning of the coarse module: `prepare_model` of the recipe's stage 2.

        A model without adapters comes from the alignment: f' starts as a copy of f, and both get their adapters.

        Raises:
            ImportError: peft is not installed.
        """
        self._begin("coarse")

    def begin_fine(self) -> None:
        """Gets ready for supervised finetuning of the fine module, see `begin_coarse`."""
        self._begin("fine")

    def _begin(self, granularity: str) -> None:
        if not self.has_adapters:
            self.copy_projector("coarse", "fine")
            self.add_adapters()
        self.set_granularity(granularity)
        self.set_trainable(granularity)

    def copy_projector(self, source: str = "coarse", target: str = "fine") -> None:
        """Lets one projector start from another, as f' does from the aligned f.

        Args:
            source: granularity whose projector is read.
            target: granularity whose projector is overwritten.

        Raises:
            ValueError: another name.

        Source: CrossVLLM, App. A.1: the visual adapter is aligned before both modules are fine-tuned.
        Differs: the paper does not say how f' starts.
        """
        self._check_name(source)
        self._check_name(target)
        projectors = self.base_model.projectors
        projectors[target].load_state_dict(projectors[source].state_dict())

    def add_reference(self, source: str = "coarse", name: str | None = None) -> str:
        """Adds a frozen copy of a granularity, as the reference of preference training; it is never saved.

        Args:
            source: "coarse" or "fine".
            name: of the copy; None for `<source>_ref`.

        Returns:
            The name, for `set_granularity`.

        Raises:
            ValueError: a model without adapters, another source, or a name that is taken.

        Source: CrossVLLM, Sec. 4.2 and Algorithm 1, line 4.
        """
        name = name or f"{source}_ref"
        core = self.base_model
        core.config.check_granularity(source)
        if not self.has_adapters:
            raise ValueError("A reference is a copy of an adapter, and this model has none. Call add_adapters first.")
        if name in self.granularities:
            raise ValueError(f"A granularity called {name!r} is there already; update it with sync_reference.")
        with keep_requires_grad(self):
            inject_adapter(self, copy.deepcopy(self.peft_config[source]), name)
        activate_adapter(core.language_model, core._granularity)
        core.projectors[name] = copy.deepcopy(core.projectors[source])
        core._references[name] = source
        self.sync_reference(name)
        for _, parameter in self.granularity_parameters(name):
            parameter.requires_grad_(False)
        return name

    def sync_reference(self, name: str = "coarse_ref") -> None:
        """Makes a reference equal to its source again.

        Args:
            name: what `add_reference` returned.

        Raises:
            ValueError: no such reference.
        """
        source = self.base_model._references.get(name)
        if source is None:
            raise ValueError(f"There is no reference {name!r}; there are {sorted(self.base_model._references)}.")
        copy_adapter(self, source, name)
        self.copy_projector(source, name)
