"""Conversion of what a network predicts (eps, x_0 or v) to eps, which all samplers use.

With x_t = alpha x_0 + sigma eps (alpha^2 = alpha-bar_t, sigma^2 = 1 - alpha-bar_t), a network predicts eps (Ho et al.
2020, arXiv 2006.11239), x_0, or v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4 and
appendix D).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.engines.proxy import ModuleProxy
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.layers import QuantLayer
from qdiff.utils.finite import OutputMonitor

PREDICTIONS = ("eps", "x0", "v")


class Prediction:
    """The conversion of a network's output to eps.

    Args:
        kind: what the network predicts: `eps`, `x0` or `v`.
        alphas_cumprod: alpha-bar_t, float64 [T].

    Raises:
        ConfigError: the kind is none of these.
    """

    def __init__(self, kind: str, alphas_cumprod: Tensor) -> None:
        if kind not in PREDICTIONS:
            raise ConfigError(f" {kind!r}: expected one of {', '.join(PREDICTIONS)}", field="parameterization")
        self.kind, self.alphas_cumprod = kind, alphas_cumprod
        self._log_alphas = 0.5 * alphas_cumprod.double().log()

    def eps(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Compute eps from the network's output.

        Args:
            x: x_t [N, ...].
            t: time steps [N]; log alpha is interpolated for fractional ones.
            output: the network's output for (x, t), of the shape of `x`.

        Returns:
            The noise in `x`.
        """
        if self.kind == "eps":
            return output
        log_alpha = self._log_alpha(t).to(x.dtype if x.is_floating_point() else torch.float32)
        log_alpha = log_alpha.reshape(-1, *[1] * (x.dim() - 1))
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        if self.kind == "v":
            return alpha * output + sigma * x
        return (x - alpha * output) / sigma

    def _log_alpha(self, t: Tensor) -> Tensor:
        """log alpha at time steps `t` [N], interpolated linearly."""
        if self._log_alphas.device != t.device:
            dtype = torch.float32 if t.device.type == "mps" else torch.float64  # MPS has no float64
            self._log_alphas = self._log_alphas.to(dtype).to(t.device)
        table = self._log_alphas
        place = t.to(table.dtype).clamp(0, len(table) - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[low], table[high], place - low)


class EpsNetwork:
    """A network as samplers call it: eps(x_t, t). Every output is checked for NaN and infinity.

    Args:
        network: called with (x_t [N, ...], t [N]).
        prediction: the conversion of its output to eps.
        name: what messages call the network.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], prediction: Prediction, name: str) -> None:
        self.network, self.prediction, self.name = network, prediction, name
        self.outputs = OutputMonitor()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.network(x, t)
        self.outputs.add(t, output)
        return self.prediction.eps(x, t, output)

    def check(self, sample: Tensor) -> Tensor:
        """Check a finished sample and all outputs of the network before it.

        Args:
            sample: [N, ...].

        Returns:
            `sample`.

        Raises:
            NonFiniteError: the sample or an output holds NaN or infinity.
        """
        self.outputs.check(self.name)
        if not torch.isfinite(sample).all():
            raise NonFiniteError(
                f"{self.name}: its sample holds values that are not finite numbers; nothing of this batch was written"
            )
        return sample


def name_of(network: object) -> str:
    """What messages call a network: "the UNet" or "the quantized UNet"."""
    quantized = isinstance(network, nn.Module) and any(
        isinstance(module, QuantLayer | ModuleProxy) for module in network.modules()
    )
    return "the quantized UNet" if quantized else "the UNet"
