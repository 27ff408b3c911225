"""Peers of the figures in BENCHMARKS.md: PyTorch on an SDXL-unCLIP UNet of the released size.

    python peer.py export --dtype float16     # torch.onnx.export (dynamo), weights in memory already
    python peer.py step --dtype float32       # one eager call; also bfloat16

Needs torch, onnx, onnxscript and diffusers; no part of the product does. The module is diffusers' UNet2DConditionModel
in SDXL's build with unCLIP's widths: 2.5 billion parameters, context 256 x 1664, vector of 1024, latents 96 x 96.
"""

import argparse
import resource
import time

import torch
from diffusers import UNet2DConditionModel

THREADS = 2


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=96,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=1664,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=1024,
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "export"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--out", default="peer.onnx", help="where the exported graph goes")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = unet()
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    torch.set_default_dtype(torch.float32)
    inputs = (torch.randn(1, 4, 96, 96, dtype=dtype), torch.tensor([500.0]), torch.randn(1, 256, 1664, dtype=dtype))
    keywords = {"class_labels": torch.randn(1, 1024, dtype=dtype), "return_dict": False}
    if arguments.what == "export":
        begun = time.monotonic()
        torch.onnx.export(model, inputs, arguments.out, kwargs=keywords, dynamo=True, external_data=True)
        print(f"export {arguments.dtype} {time.monotonic() - begun:.1f} s, peak {peak_mib():.0f} MiB")
        return
    with torch.inference_mode():
        for _ in range(arguments.calls):
            begun = time.monotonic()
            model(*inputs, **keywords)
            print(f"step {arguments.dtype} {time.monotonic() - begun:.2f} s, peak {peak_mib():.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
