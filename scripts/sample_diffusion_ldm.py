"""Sample images from a latent diffusion model, in full precision or quantized, calibrating it first if needed.

    python scripts/sample_diffusion_ldm.py -r models/ldm/lsun_beds256/model.ckpt -n 20 --batch_size 10 \
        -c 200 -e 1.0 --seed 41 --ptq --weight_bit 4 --quant_act --act_bit 8 --a_sym -l results --cali_ckpt ckpt.pth

The YAML file is `config.yaml` beside the checkpoint. Arguments of the form `model.params.key=value` override its
settings. The images are written to <logdir>/<model>/samples/<timestamp>/img, and all of them to one .npz beside it.
"""

from qdiff_cli.commands.sample_ldm import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
