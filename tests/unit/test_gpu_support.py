"""What calibration and sampling do for GPUs, as far as it can be tested without one."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddim.family import PIXEL
from qdiff.calibration import finetune
from qdiff.calibration.batches import add_gradients, in_batches
from qdiff.calibration.finetune import FineTuner
from qdiff.calibration.recompute import recomputed
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.utils import devices, distributed
from qdiff.utils.memory import Fitting, is_out_of_memory
from tests.support import tiny
from tests.support.engines import network_of


def test_batches_that_did_not_fit_are_not_tried_again():
    weight, tried = torch.ones(1, requires_grad=True), []

    def loss(part):
        tried.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return (weight * part.float().mean()).sum()

    fitting, batch = Fitting(), torch.arange(8)
    values = []
    for _ in range(3):
        values.append(float(add_gradients(loss, batch, [weight], fitting)))
    assert tried == [8, 4, *[2] * 12]
    assert values == [3.5] * 3 and weight.grad is not None and weight.grad.item() == pytest.approx(10.5)
    tried.clear()
    in_batches(lambda part: loss(torch.arange(part.start, part.stop)) and None, range(8), 8, fitting)
    assert tried == [2] * 4


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_allocation_errors_of_the_libraries_of_cuda_are_recognized(message):
    assert is_out_of_memory(RuntimeError(message)) and not is_out_of_memory(ValueError(message))


def test_recomputed_blocks_give_the_same_gradients_and_keep_less(tmp_path):
    network, architecture, rows = network_of("text", tmp_path)
    quant = QuantConfig(weight_bit=4, quant_act=True, quant_mode="linear")
    quantized = Calibration(network, architecture, quant, CalibrationConfig(), rows).run()
    modules = [module for module in quantized.modules() if type(module).__name__ == "BasicTransformerBlock"]
    biases = [module.bias.requires_grad_() for module in quantized.modules() if isinstance(module, nn.GroupNorm)]
    inputs = tuple(part[:2] for part in rows.inputs)
    gradients, kept = [], []
    for chosen in ((), modules):
        sizes: list[int] = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recomputed(chosen):
            loss = quantized(*inputs).square().mean()
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, biases))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert kept[1] < kept[0]
    assert not any("forward" in vars(module) for module in modules)


def test_fine_tuning_that_does_not_fit_is_left_out_with_a_line_in_the_log(monkeypatch, caplog):
    network = tiny.unet()
    data = tiny.rows(network).split(0.2, 0)
    quant = QuantConfig(weight_bit=4, quant_act=True, split=True, quant_mode="linear")
    quantized = Calibration(network, PIXEL, quant, CalibrationConfig(), data).run()
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}

    def too_large(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(finetune, "add_gradients", too_large)
    config = replace(CalibrationConfig(), iters_tune_a=5)
    result = FineTuner(network, quantized, data, config).run(lambda _: None)
    assert result.after == result.before
    assert "fine-tuning ends after 0 iterations: one sample is too large" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())


def test_gradients_of_one_type_are_exchanged_at_once(monkeypatch):
    exchanged = []

    def all_reduce(tensor):
        exchanged.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    tensors = [torch.ones(2, 3), torch.ones(5), torch.ones(1, dtype=torch.float64), torch.ones(())]
    distributed.sum_over_ranks(tensors)
    assert exchanged == [12, 1] and all((tensor == 2).all() for tensor in tensors)


@pytest.mark.parametrize("tf32", [True, False])
def test_the_precision_of_float32_products_is_chosen_and_put_back(caplog, tf32):
    caplog.set_level(logging.INFO)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic

    before = settings()
    with devices.float32_products(torch.device("cpu"), tf32):
        assert settings() == before
    with devices.float32_products(torch.device("cuda"), tf32):
        assert settings() == (tf32, tf32, True)
    assert settings() == before
    assert caplog.messages == [f"float32 products on CUDA: {'TF32' if tf32 else 'full precision'}"]
