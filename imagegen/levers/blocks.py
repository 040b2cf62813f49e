"""diffusers' own step caches, for transformers that have them (`CacheMixin`).

Each is switched on when a run begins to compute and off when it ends, however it ends: diffusers' caches keep
their state otherwise, and the picture after a stopped one comes out wrong.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from imagegen.levers.lever import Lever, Patches, RunFacts, Target

CACHES = frozenset({"first-block-cache", "taylorseer-cache", "mag-cache", "sea-cache"})


@dataclass
class _DiffusersCache(Lever):
    """A cache of diffusers; what it skipped is counted on the attention of the last blocks."""

    stage: ClassVar[int] = 6

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: diffusers knows the blocks of some transformers only, which a trial finds out."""
        self.worker, trial = target.worker, Patches()
        self._keep(trial)
        try:
            self.worker.enable_cache(self.config(num_steps=2))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return f"diffusers has no {self.name} for this {type(self.worker).__name__}: use step-cache"
        finally:
            trial.undo()
        return None

    def _keep(self, patches: Patches) -> None:
        """Remember what diffusers changes of the worker."""
        for module in self.worker.modules():
            for name in ("forward", "_diffusers_hook", "_cache_config"):
                patches.keep(module, name)

    @abstractmethod
    def config(self, num_steps: int) -> Any:
        """Return diffusers' configuration for a run of so many steps."""

    def apply(self, target: Target) -> None:
        """Stand before the denoiser and count what is computed of it; the cache comes with a run."""
        self.worker = target.worker
        self.during_run = Patches()
        self.run: RunFacts | None = None
        self.context = target.worker.cache_context
        self.patches.set(target.denoiser, "cache_context", self._note)
        self.patches.wrap(target.worker, "forward", self._around)
        for module in self._probes():
            self.patches.count(module, "forward", self.counts, "attentions computed")

    def _probes(self) -> list[Any]:
        return [module for name, module in self.worker.named_modules() if name.rsplit(".", 1)[-1] in ("attn", "attn1")]

    @contextmanager
    def _note(self, name: str, **facts: Any) -> Iterator[None]:
        """Remember which call the pipeline says comes: `cond`, say."""
        self.said: tuple[str, dict[str, Any]] | None = (name, facts)
        try:
            yield
        finally:
            self.said = None

    def _around(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.counts["denoiser calls"] += 1
            if self.run is None:
                return compute(*args, **kwargs)
            if not self.worker.is_cache_enabled:
                self.worker.enable_cache(self.config(self.run.count_steps()))
            name, facts = self.said or (f"call {self.calls}", {})  # many pipelines say nothing
            self.calls += 1
            with self.context(name, **facts):
                return compute(*args, **kwargs)

        return forward

    def begin(self, run: RunFacts) -> None:
        """Let the first call switch the cache on, empty: only then is it known how many steps there are."""
        self.run, self.said, self.calls = run, None, 0
        self._keep(self.during_run)

    def advance(self, index: int, num_steps: int) -> None:
        """Count the calls of the next step from 0."""
        self.calls = 0

    def end(self) -> None:
        """Switch it off; with it goes its state, and the hooks that diffusers leaves empty."""
        self.run = None
        if self.worker.is_cache_enabled:
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

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: FLUX.2's single blocks return text and picture in one, which diffusers takes apart."""
        if type(target.worker).__name__ == "Flux2Transformer2DModel":
            return "diffusers' first-block-cache fails on the single blocks of FLUX.2: use taylorseer-cache or step-cache"
        return super().requires(target)

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
