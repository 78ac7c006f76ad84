"""``LoomModel``: the PEFT tuner that puts loom layers into a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraloom.errors import InputError
from loraloom.patterns import is_target, pattern_value
from loraloom.tuner import neighbours
from loraloom.tuner.config import FORMAT_VERSION, LoomConfig
from loraloom.tuner.conv import LoomConv
from loraloom.tuner.embedding import LoomEmbedding
from loraloom.tuner.experts import ParamWrapper, check_attention
from loraloom.tuner.fit import check_fit, check_sizes
from loraloom.tuner.layer import BASE, Factor, LoomLayer
from loraloom.tuner.linear import LoomLinear
from loraloom.tuner.peft_internals import (
    PREFIX,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    BaseTuner,
    ExcludedModule,
    get_quantization_kwargs,
    register,
    resolve_quantization_backend,
)
from loraloom.tuner.quantized import prevent_cpu_repacking
from loraloom.tuner.targets import check_tokens, prepare_targets
from loraloom.tuner.weight_reads import modules_read
from loraloom.update.composition import Tie


class LoomModel(BaseTuner):
    """Injects, switches and merges loom adapters; see ``peft.tuners.tuners_utils.BaseTuner`` for the interface."""

    prefix = PREFIX
    tuner_layer_cls = LoomLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes anything, so a mistake leaves the model as it was.
        prevent_cpu_repacking(model)
        layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoomLayer))
        for name, _ in model.named_modules():
            if f".{name}".rpartition(".")[2].startswith(PREFIX) and not name.startswith(layers):
                raise ValueError(
                    f"The model has a module {name!r}: names that start with {PREFIX!r} are the adapter's. Rename it."
                )
        prepare_targets(peft_config, model, partial(self._check_target_module_exists, peft_config))
        check_tokens(peft_config, model)
        composition = getattr(peft_config, "composition", None)
        if composition is not None:
            present = {name for name, _ in model.named_modules()}
            if absent := [name for name in composition.ranks if name not in present]:
                raise ValueError(
                    f"The composition adapts {len(absent)} modules that the model does not have ({absent[0]}, ...): it "
                    "belongs to another base model."
                )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        # PEFT's version asks for target_modules even where target_parameters are all that is wanted.
        if peft_config.target_modules is None and peft_config.target_parameters:
            known = self.target_module_mapping.get(model_config.get("model_type"))
            peft_config.target_modules = set(known) if isinstance(known, list) else known
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # PEFT's version matches expressions without a limit of time, and they may come from anyone's file.
        names = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        found = is_target(key, *(getattr(peft_config, name) for name in names))
        return ExcludedModule() if found is None else found

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT's way to merge LoRA factors adds cross terms.

        Raises:
            InputError: always; the message names what to use.
        """
        raise InputError(
            "add_weighted_adapter combines A and B apart, which is not the sum of the updates: use "
            "loraloom.compose(model, {name: folder}, weights=...), which is exact.",
            code="add-weighted-adapter",
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the layers of a composition whose scope is wider than a layer are tied."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name in modules_read(model):
            if isinstance(layer := model.get_submodule(name), LoomLayer):
                layer.weight_is_read = True
        config: Any = self.peft_config[adapter_name]
        config.loom_format_version = FORMAT_VERSION
        composition = config.composition
        if composition is None or composition.scope == "layer":
            return
        groups: dict[str, list[LoomLayer]] = {}
        for module in composition.ranks:
            groups.setdefault(composition.group(module), []).append(model.get_submodule(module))  # type: ignore[arg-type]
        for layers in groups.values():
            tie = Tie([layer.holder("logits")[adapter_name] for layer in layers])
            for layer in layers:
                layer.compositions[adapter_name].tie = tie

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
        r = pattern_value(ranks, current_key, peft_config.r)
        alpha = pattern_value(alphas, current_key, peft_config.lora_alpha)
        composition = peft_config.composition
        if composition is not None:
            if current_key not in composition.ranks:  # it only ends like a target
                return
            r = alpha = sum(composition.ranks[current_key])
        if isinstance(target, LoomLayer) and (parameter_name is None or _wraps(target, parameter_name)):
            target.update_layer(adapter_name, peft_config, r, alpha)
            if isinstance(attention := target.get_base_layer(), nn.MultiheadAttention):
                attention.out_proj.update_layer(adapter_name, peft_config, r, alpha)  # type: ignore[operator]
            if composition is not None:
                target.add_composition(adapter_name, composition, current_key)
            return
        if isinstance(target, nn.MultiheadAttention) and parameter_name is None:
            parameter_name = check_attention(target, current_key)
            out_proj = LoomLinear(target.out_proj, adapter_name, peft_config, r, alpha)
            out_proj.requires_grad_(adapter_name in self.active_adapters)
            out_proj.base_layer.requires_grad_(False)
            target.out_proj = out_proj  # type: ignore[assignment]
        if parameter_name is not None:
            wrapper = ParamWrapper(target, adapter_name, peft_config, r, alpha, parameter_name)
            if adapter_name not in self.active_adapters:
                wrapper.requires_grad_(False)
            setattr(parent, target_name, wrapper)
            return
        backend = resolve_quantization_backend(target, **get_quantization_kwargs(self.model))
        new_module = _layer_class(target, backend, current_key)(target, adapter_name, peft_config, r, alpha, backend)
        if composition is not None:
            new_module.add_composition(adapter_name, composition, current_key)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A loom layer places its own tensors and the base keeps its own; PEFT's version copies attributes besides,
        # which fails when the module given back is a wrapper (trainable tokens).
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT casts a new adapter, and casts again after every load. Where a run is resumed, the load goes into an
        # adapter that exists, whose dtype the trainer may have chosen since (TRL: bf16 on a quantised base), and the
        # run must go on in that dtype.
        factors = [m for n, m in self.named_modules() if isinstance(m, Factor) and n.endswith(f".{adapter_name}")]
        if any(factor.dtype_is_settled for factor in factors):
            return
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for factor in factors:
            factor.dtype_is_settled = not factor.weight.is_meta  # on meta, the dtype will be the checkpoint's

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        # PEFT's version refuses what Mamba's kernels read; here such a layer gives them the adapted weight.
        pass

    def _check_merge_allowed(self) -> None:
        # PEFT's version warns, by names and the model's config; the merged model would be another function.
        owners: dict[nn.Parameter, str] = {}
        for name, module in self.model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None:
                continue
            other = owners.setdefault(weight, name)
            layers = [self.model.get_submodule(n.removesuffix(".base_layer")) for n in (other, name)]
            if other != name and any(isinstance(layer, LoomLayer) for layer in layers):
                raise ValueError(
                    f"{other.removesuffix('.base_layer')} shares its weight with {name.removesuffix('.base_layer')}, "
                    "so merging would change both: give each a copy first (tie_word_embeddings=False when loading)."
                )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` to the layers during one forward pass (or generate)."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first.")
        known = {name for layer in self.modules() if isinstance(layer, LoomLayer) for name in layer.holder("A")}
        unknown = sorted({*names} - known - {BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model's adapters are "
                f"{', '.join(sorted(known))} and {BASE}."
            )
        if reads := [name for name, layer in self.model.named_modules() if getattr(layer, "weight_is_read", False)]:
            raise InputError(
                f"adapter_names cannot be used: the model reads the weight of {reads[0]} instead of calling it, so all "
                "samples share one. Use set_adapter and one batch per adapter.",
                code="weight-is-read",
            )
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        # Beam search repeats each sample for the decoder only.
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, LoomLayer | AuxiliaryTrainingWrapper):
                    given = list(names) if module in in_encoder else repeated
                    hook = partial(_pass_adapter_names, adapter_names=given)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_fit(model, adapter_name, remapped)
        return remapped

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_sizes(self, state_dict, prefix)  # of the whole model, before its first layer is loaded
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _wraps(layer: LoomLayer, parameter_name: str) -> bool:
    return isinstance(layer, ParamWrapper) and layer.parameter_name == parameter_name


def _layer_class(target: nn.Module, backend: Any, key: str) -> Callable[..., LoomLayer]:
    if backend is not None and backend.layer_type == "linear":
        return LoomLinear
    if isinstance(target, nn.Embedding):
        return LoomEmbedding
    if isinstance(target, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return LoomConv
    if isinstance(target, nn.Linear | Conv1D):
        return LoomLinear
    raise ValueError(
        f"{key} is a {type(target).__name__}, which cannot be adapted. Supported are nn.Linear, transformers' Conv1D, "
        "nn.Embedding, nn.Conv1d to nn.Conv3d and the quantised linear layers that PEFT knows."
    )


def _pass_adapter_names(_module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": adapter_names}


register(LoomConfig, LoomModel)
neighbours.watch()
