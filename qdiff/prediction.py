"""What a network predicts: its output becomes eps here, and nowhere else.

With x_t = alpha x_0 + sigma eps (alpha^2 = alpha-bar_t, sigma^2 = 1 - alpha-bar_t) a network predicts eps (Ho et al. 2020,
arXiv 2006.11239), x_0, or v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4 and appendix D).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.engines.proxy import ModuleProxy
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.layers import QuantLayer
from qdiff.utils.finite import FiniteSteps

PREDICTIONS = ("eps", "x0", "v")


class Prediction:
    """From a network's output to eps.

    Args:
        kind: eps | x0 | v.
        alphas_cumprod: alpha-bar_t, float64 [T].

    Raises:
        ConfigError: another kind.
    """

    def __init__(self, kind: str, alphas_cumprod: Tensor) -> None:
        if kind not in PREDICTIONS:
            raise ConfigError(f"parameterization {kind!r}: expected one of {', '.join(PREDICTIONS)}")
        self.kind, self.alphas_cumprod = kind, alphas_cumprod
        self._log_alphas = 0.5 * alphas_cumprod.double().log()

    def eps(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise in `x` [N, ...] at time steps `t` [N] (fractions too: log alpha is interpolated), from the output for them."""
        if self.kind == "eps":
            return output
        log_alpha = self._log_alpha(t).to(x.dtype if x.is_floating_point() else torch.float32)
        log_alpha = log_alpha.reshape(-1, *[1] * (x.dim() - 1))
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        if self.kind == "v":
            return alpha * output + sigma * x
        return (x - alpha * output) / sigma

    def _log_alpha(self, t: Tensor) -> Tensor:
        if self._log_alphas.device != t.device:
            double = torch.float32 if t.device.type == "mps" else torch.float64
            self._log_alphas = self._log_alphas.to(double).to(t.device)
        table = self._log_alphas
        place = t.to(table.dtype).clamp(0, len(table) - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[low], table[high], place - low)


class EpsNetwork:
    """A network as its sampler sees it: eps(x_t, t), with every output watched for values that are not finite.

    Args:
        network: called with (x_t [N, ...], t [N]).
        prediction: what it predicts.
        name: what messages call it.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], prediction: Prediction, name: str) -> None:
        self.network, self.prediction, self.name = network, prediction, name
        self.outputs = FiniteSteps()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.network(x, t)
        self.outputs.add(t, output)
        return self.prediction.eps(x, t, output)

    def check(self, sample: Tensor) -> Tensor:
        """The finished `sample`; NonFiniteError where it or an output before it is not finite."""
        self.outputs.check(self.name)
        if not torch.isfinite(sample).all():
            raise NonFiniteError(
                f"{self.name}: its sample holds values that are not finite numbers; nothing of this batch was written"
            )
        return sample


def name_of(network: object) -> str:
    """What messages call a network: the UNet, quantized or not."""
    quantized = isinstance(network, nn.Module) and any(
        isinstance(m, QuantLayer | ModuleProxy) for m in network.modules()
    )
    return "the quantized UNet" if quantized else "the UNet"
