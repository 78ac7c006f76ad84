"""Changing the scale of an adapter that is in a model, by the names that PEFT, diffusers and transformers call."""

from loraloom.tuner.peft_internals import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """The part of a loom layer that holds scales: ``scaling`` as it is now, ``unscaled`` as configured, by adapter."""

    scaling: dict[str, float]
    unscaled: dict[str, float]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Makes the update of one adapter `scale` times what its configuration says."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.unscaled[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the updates of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides them by `scale`; None goes back to what the configuration says."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.unscaled[name] if scale is None else self.scaling[name] / scale
