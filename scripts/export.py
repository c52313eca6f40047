"""Convert a calibrated checkpoint between the published and the packed format, or export it to ONNX.

    python scripts/export.py --config configs/cifar10.yml --weight_bit 4 --quant_act --a_sym --split \
        --cali_ckpt ckpt.pth -o ckpt.safetensors
    python scripts/export.py --config configs/emoji32.yml --weight_bit 4 --quant_act --a_sym --split \
        --cali_ckpt models/ddim/emoji32/w4a8.safetensors -o emoji32.onnx
    python scripts/export.py --cali_ckpt <folder of a quantized pipeline> -o unet.onnx

The suffix of the output selects the format: .safetensors (packed), .pth (published) or .onnx. ONNX needs the extra
`export` (`pip install ".[export]"`); its network takes any batch size, height and width, unless --batch_size, --H and
--W fix them. Of a pipeline of diffusers that `quantize_pipeline` quantized and `save_pretrained` wrote, the UNet or
transformer is exported; the folder says its settings. A published file needs the full-precision weights (--ckpt,
--use_pretrained); without them it gets weights in the middle of their rounding intervals. With --ckpt, the autoencoder
and the text tower of a latent model are written beside its packed file (stages.safetensors).
"""

from qdiff_cli.commands.export import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
