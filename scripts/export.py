"""Convert a calibrated checkpoint between the published format and the packed one, or export it to ONNX.

    python scripts/export.py --config configs/cifar10.yml --weight_bit 4 --quant_act --a_sym --split \
        --cali_ckpt ckpt.pth -o ckpt.safetensors
    python scripts/export.py --config configs/cifar10.yml --weight_bit 4 --quant_act --a_sym --split \
        --cali_ckpt ckpt.safetensors -o ckpt.pth
    python scripts/export.py --config configs/stable-diffusion/v1-inference.yaml --ckpt sd-v1-4.ckpt --weight_bit 4 --quant_act \
        --sm_abit 16 --split --cali_ckpt ckpt.pth -o ckpt.safetensors

    python scripts/export.py --config configs/emoji32.yml --weight_bit 4 --quant_act --a_sym --split \
        --cali_ckpt models/ddim/emoji32/w4a8.safetensors -o emoji32.onnx

The ending of the output says which format is written. ONNX (.onnx) needs the extra `export` (`pip install ".[export]"`); such a network
takes any batch size, height and width, unless --batch_size, --H and --W fix them. Without full-precision weights (--ckpt,
--use_pretrained) a published file carries weights that lie in the middle of their rounding interval. With --ckpt, a packed file of a
latent model gets its autoencoder and text tower beside it (stages.safetensors).
"""

from qdiff_cli.commands.export import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
