"""Which stored tensor fills which parameter of the loaded model, asked of transformers' own renaming."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lora_cli.adapters.trained import Trained
from lora_cli.errors import LoraError
from lora_cli.merging.tensors import Fresh, is_beside

_COMPUTED = (".inv_freq", ".masked_bias", ".attn.bias")
_TOGETHER = "use base and adapter together instead: lora generate ADAPTER"


def _parameter_names(model: Any) -> dict[str, str]:
    """Every parameter and buffer by the name it has without adapters, with the name that it has now."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return {
        name.replace(".base_layer.", "."): name
        for name in names
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), Trained)
    }


@dataclass(frozen=True)
class Places:
    """Where each stored tensor goes in a model.

    direct: stored name → parameter. converted: stored names and the parameters that are made of them together (one
    stored projection that becomes three, for example). parameters: as they are named without and with adapters.
    """

    model: Any
    parameters: dict[str, str]
    direct: dict[str, str]
    converted: list[tuple[set[str], set[str]]]
    names: Collection[str]

    @classmethod
    def of(cls, model: Any, stored: Collection[str]) -> Places:
        parameters = _parameter_names(model)
        conversions = get_model_conversion_mapping(model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        direct: dict[str, str] = {}
        converted: list[tuple[set[str], set[str]]] = []
        for name in sorted(stored, key=dot_natural_key):  # some renamings count on this order
            renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
            if renamed not in parameters and name in parameters:
                renamed, pattern = name, None
            if pattern is None:
                direct[name] = renamed
                continue
            converter = next(each for each in converters if pattern in each.source_patterns)
            first = converter.target_patterns[0]
            converted.append(({name}, {renamed.replace(first, each) for each in converter.target_patterns}))
        return cls(model, parameters, direct, _joined(converted), stored)

    def fresh(self, changed: Mapping[str, Fresh]) -> dict[str, Fresh]:
        """The changed parameters by stored name, in the form in which the checkpoint stores them.

        Raises LoraError if one has no place there.
        """
        found = {name: changed[parameter] for name, parameter in self.direct.items() if parameter in changed}
        reached = {id(each) for each in found.values()}
        for names, parameters in self.converted:
            if not parameters & changed.keys():
                continue
            values = {
                each: changed[each].whole() if each in changed else self.model.get_parameter(self.parameters[each])
                for each in parameters & self.parameters.keys()
            }
            found |= self._as_stored(values, names)
            reached |= {id(changed[each]) for each in parameters & changed.keys()}
        lost = [name for name, each in changed.items() if id(each) not in reached]
        if lost:
            what = f"{len(lost)} merged layers have no place in the base's weight files, the first is {lost[0]}"
            raise LoraError(what, fix=_TOGETHER)
        return found

    def unused(self, fresh: Collection[str]) -> list[str]:
        """Stored tensors that fill nothing in the model; buffers of older versions that it computes itself aside."""
        used = {name for name, parameter in self.direct.items() if parameter in self.parameters}
        used |= {name for names, parameters in self.converted if parameters & self.parameters.keys() for name in names}
        left = (name for name in self.names if name not in used and not name.endswith(_COMPUTED))
        return [name for name in left if not is_beside(name, fresh)]

    def _as_stored(self, values: dict[str, Tensor], names: set[str]) -> dict[str, Fresh]:
        """Several parameters in the form of the checkpoint, as transformers' saving would bring them back into it."""
        model, prefix = self.model, f"{self.model.base_model_prefix}."
        own = vars(model).pop("_weight_conversions", None)
        try:
            model._weight_conversions = get_model_conversion_mapping(model)
            written = revert_weight_conversion(model, values)
        finally:
            model._weight_conversions = own
        places = {name.removeprefix(prefix): name for name in names}
        found = {
            places[name.removeprefix(prefix)]: Fresh(tuple(value.shape), lambda value=value: iter([value.float()]))
            for name, value in written.items()
            if name.removeprefix(prefix) in places
        }
        if found.keys() != names:
            what = f"{min(names - found.keys())} of the base's weight files cannot be made of the merged layers"
            raise LoraError(what, fix=_TOGETHER)
        return found


def _joined(pairs: list[tuple[set[str], set[str]]]) -> list[tuple[set[str], set[str]]]:
    """Pairs that share a parameter, as one."""
    groups: dict[str, tuple[set[str], set[str]]] = {}
    for names, targets in pairs:
        mine = (set(names), set(targets))
        for shared in [groups[target] for target in targets if target in groups]:
            mine = (mine[0] | shared[0], mine[1] | shared[1])
        groups |= dict.fromkeys(mine[1], mine)
    return list({id(group): group for group in groups.values()}.values())
