"""What a sampler is: one signature for all of them, and how a sampler joins the registry of its family."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar, cast

from torch import Tensor

from qdiff.errors import ConfigError
from qdiff.utils.registry import Registry

Denoiser = Callable[[Tensor, Tensor], Tensor]  # eps(x_t [N, ...], t [N]) -> [N, ...]
Noise = Callable[[], Tensor]  # each call returns the next standard normal tensor of the shape of x
Callback = Callable[[Tensor, Tensor, Tensor], None]  # receives (x_t, t, eps) of every network evaluation

SamplerConfig = TypeVar("SamplerConfig")


class SampleFunction(Protocol):
    """A sampling algorithm: from noise to samples."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        alphas_cumprod: Tensor,
        timesteps: Tensor,
        noise: Noise,
        callback: Callback | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """Sample a batch.

        Args:
            denoiser: the noise prediction eps(x_t, t) with t [N], float32.
            x: starting noise, [N, ...].
            alphas_cumprod: alpha-bar_t, float64 [T].
            timesteps: the times to visit, as `Sampler.timesteps` returns them.
            noise: source of further noise. Deterministic samplers do not call it.
            callback: called after every evaluation of the network.
            eta: the amount of noise that DDIM adds, 0 to 1. Other samplers ignore it.

        Returns:
            Samples of x_0, of the shape of `x`.
        """
        ...


@dataclass(frozen=True)
class Sampler(Generic[SamplerConfig]):
    """A sampling algorithm with its schedule.

    Attributes:
        name: the name that settings use.
        sample: the algorithm.
        timesteps: from the settings and the number of time steps T of the model to the times that the sampler visits:
            int64 time steps, ascending, or a float64 grid of continuous times.
        stochastic: whether the sampler can add noise. A deterministic sampler refuses an eta other than 0.
        num_evaluations: from the times to the number of network evaluations of one image.
        uses_eta: whether the sampler heeds `eta`.
        uses_spacing: whether `timesteps` heeds the spacing of the settings (uniform or quad).
        clips: whether `sample` takes `clip_x0`, the largest |x_0| that it predicts (infinity: no limit).
    """

    name: str
    sample: SampleFunction
    timesteps: Callable[[SamplerConfig, int], Tensor]
    stochastic: bool
    num_evaluations: Callable[[Tensor], int] = len
    uses_eta: bool = False
    uses_spacing: bool = False
    clips: bool = False

    def clipped(self, clip_x0: float | None) -> SampleFunction:
        """Return the algorithm with another largest |x_0|.

        Args:
            clip_x0: the largest |x_0|. None, or an algorithm that does not clip, changes nothing.
        """
        if clip_x0 is None or not self.clips:
            return self.sample
        return partial(cast(Callable[..., Tensor], self.sample), clip_x0=clip_x0)

    def validate(self, num_timesteps: int, eta: float, total: int) -> None:
        """Check the settings that all samplers share.

        Args:
            num_timesteps: number of sampling steps.
            eta: the amount of noise that DDIM adds.
            total: number of time steps of the model.

        Raises:
            ConfigError: fewer than 1 or more than `total` sampling steps; an eta outside 0 to 1, or one that is not 0
                for a deterministic sampler.
        """
        if not 1 <= num_timesteps <= total:
            raise ConfigError(f" {num_timesteps}: expected 1 to {total} sampling steps", field="timesteps")
        if not 0 <= eta <= 1:
            raise ConfigError(f" {eta:g}: expected 0 to 1", field="eta")
        if eta and not self.stochastic:
            raise ConfigError(f"{self.name} is deterministic: expected eta 0, found {eta:g}")


Function = TypeVar("Function", bound=SampleFunction)


def register_sampler(
    registry: Registry[Sampler[SamplerConfig]],
    name: str,
    timesteps: Callable[[SamplerConfig, int], Tensor],
    stochastic: bool,
    num_evaluations: Callable[[Tensor], int] = len,
    uses_eta: bool = False,
    uses_spacing: bool = False,
    clips: bool = False,
) -> Callable[[Function], Function]:
    """Decorate a sampling function in order to add it to the registry of its family; see `Sampler`."""

    def decorate(sample: Function) -> Function:
        sampler = Sampler(name, sample, timesteps, stochastic, num_evaluations, uses_eta, uses_spacing, clips)
        registry.register(name, sampler)
        return sample

    return decorate
