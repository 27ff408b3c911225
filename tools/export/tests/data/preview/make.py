"""Writes the files of this folder: python make.py taesd.py, the latter from github.com/madebyollin/taesd."""

import sys

import torch
from safetensors.torch import save_file

WIDTH = 5

source = open(sys.argv[1]).read()
# The original's own classes at a width that fits a repository.
original = {}
exec(source.split("class TAESD(")[0].replace("64", str(WIDTH)), original)

torch.manual_seed(7)
decoder = original["Decoder"](latent_channels=4)
with torch.no_grad():
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.11 if parameter.ndim == 4 else 0.1))
weights = {name: value.contiguous() for name, value in decoder.state_dict().items()}
save_file(weights, "taesdxl_decoder.safetensors")
# Diffusers counts the same layers from the first convolution on.
tiny = {}
for name, value in weights.items():
    number, rest = name.split(".", 1)
    tiny[f"decoder.layers.{int(number) - 1}.{rest}"] = value.clone()
save_file(tiny, "taesdxl_diffusers.safetensors")
# Large values too: the squashing has to show.
latent = torch.randn(2, 4, 3, 2) * 3
with torch.no_grad():
    image = decoder(latent)
save_file({"latent": latent, "image": image}, "io_preview.safetensors")
print(torch.__version__, image.abs().max().item(), image.std().item())
