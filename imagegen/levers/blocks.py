"""diffusers' own step caches, for transformers that have them (`CacheMixin`).

Each is switched on when a run begins and off when it ends, however it ends: diffusers' caches keep
their state otherwise, and the picture after a stopped one comes out wrong.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from imagegen.levers.lever import Lever, Patches, RunFacts, Target

CACHES = frozenset({"first-block-cache", "taylorseer-cache", "mag-cache", "sea-cache"})


@dataclass
class _DiffusersCache(Lever):
    """A cache of diffusers; what it skipped is counted on the attention of the last blocks."""

    stage: ClassVar[int] = 6

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if not hasattr(target.worker, "enable_cache"):
            return f"diffusers has no {self.name} for a {type(target.worker).__name__}: use step-cache"
        return None

    @abstractmethod
    def config(self, num_steps: int) -> Any:
        """Return diffusers' configuration for a run of so many steps."""

    def apply(self, target: Target) -> None:
        """Count the calls of the denoiser and what is computed of them; the cache comes with a run."""
        self.worker = target.worker
        self.during_run = Patches()
        if target.worker is not target.denoiser:  # pipelines name each call's half of guidance to the denoiser
            self.patches.set(target.denoiser, "cache_context", target.worker.cache_context)
        self.patches.count(target.worker, "forward", self.counts, "denoiser calls")
        for module in self._probes():
            self.patches.count(module, "forward", self.counts, "attentions computed")

    def _probes(self) -> list[Any]:
        return [module for name, module in self.worker.named_modules() if name.rsplit(".", 1)[-1] == "attn"]

    def begin(self, run: RunFacts) -> None:
        """Switch the cache on, empty."""
        for module in self.worker.modules():
            for name in ("forward", "_diffusers_hook", "_cache_config"):
                self.during_run.keep(module, name)
        self.worker.enable_cache(self.config(run.num_steps))

    def end(self) -> None:
        """Switch it off; with it goes its state, and the hooks that diffusers leaves empty."""
        self.worker.disable_cache()
        self.during_run.undo()

    def engaged(self) -> str:
        """Return what was skipped; empty if nothing was."""
        whole = self.counts["denoiser calls"] * len(self._probes())
        skipped = whole - self.counts["attentions computed"]
        return f"{skipped} of {whole} attentions skipped" if skipped > 0 else ""


@dataclass
class FirstBlockCache(_DiffusersCache):
    """Skip the other blocks where the first one's output has hardly changed."""

    threshold: float = 0.05

    name: ClassVar[str] = "first-block-cache"
    conflicts: ClassVar[frozenset[str]] = CACHES - {"first-block-cache"} | {"step-cache", "compile", "openvino"}

    def config(self, num_steps: int) -> Any:
        """Return diffusers' configuration."""
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=self.threshold)


@dataclass
class TaylorSeerCache(_DiffusersCache):
    """Continue the attention outputs by a Taylor series between computed steps."""

    interval: int = 3
    warmup: int = 3
    order: int = 1

    name: ClassVar[str] = "taylorseer-cache"
    conflicts: ClassVar[frozenset[str]] = CACHES - {"taylorseer-cache"} | {"step-cache", "compile", "openvino"}

    def config(self, num_steps: int) -> Any:
        """Return diffusers' configuration; the last step is computed."""
        from diffusers import TaylorSeerCacheConfig

        dtype = next(self.worker.parameters()).dtype
        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            disable_cache_after_step=num_steps - 1,
            max_order=self.order,
            taylor_factors_dtype=dtype,
        )


@dataclass
class MagCache(_DiffusersCache):
    """Skip blocks while the summed change of the residuals' magnitude stays small.

    `ratios` are the checkpoint's own, one for each step of its calibration; FLUX's are known.
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] = ()

    name: ClassVar[str] = "mag-cache"
    conflicts: ClassVar[frozenset[str]] = CACHES - {"mag-cache"} | {"step-cache", "compile", "openvino"}

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: the ratios belong to a checkpoint."""
        if not self.ratios and type(target.worker).__name__ != "FluxTransformer2DModel":
            return "mag-cache needs this checkpoint's own ratios=(…): calibrate with diffusers' MagCacheConfig(calibrate=True)"
        return super().requires(target)

    def config(self, num_steps: int) -> Any:
        """Return diffusers' configuration."""
        from diffusers import MagCacheConfig
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        return MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip,
            retention_ratio=self.retention,
            num_inference_steps=num_steps,
            mag_ratios=list(self.ratios) or FLUX_MAG_RATIOS,
        )


@dataclass
class SeaCache(_DiffusersCache):
    """Skip blocks where a spectral indicator has hardly changed, for the video models that diffusers adapts it to."""

    threshold: float = 0.25

    name: ClassVar[str] = "sea-cache"
    conflicts: ClassVar[frozenset[str]] = CACHES - {"sea-cache"} | {"step-cache", "compile", "openvino"}

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: diffusers adapts it to few transformers."""
        kind = type(target.worker).__name__
        if not kind.startswith(("Cosmos3", "WanTransformer")):
            return f"diffusers' SeaCache has no adapter for a {kind}: use first-block-cache or step-cache"
        return super().requires(target)

    def config(self, num_steps: int) -> Any:
        """Return diffusers' configuration."""
        from diffusers import SeaCacheConfig

        return SeaCacheConfig(threshold=self.threshold)
