"""Writes the ZeRO folders beside it as DeepSpeed's engine saves them, and what its zero_to_fp32.py makes of them.

Arguments: the path of a copy of deepspeed/utils/zero_to_fp32.py. Needs torch, numpy, safetensors and tqdm.
DeepSpeed itself is not needed: the few classes that its files name are made here under the same names.
"""

import importlib.util
import os
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

import torch
from safetensors.torch import save_file


def module(name, **members):
    made = types.ModuleType(name)
    for key, value in members.items():
        if isinstance(value, type):
            value.__module__ = name
            value.__qualname__ = key
        setattr(made, key, value)
    sys.modules[name] = made


class ZeroStageEnum(int, Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    def __init__(self, scale):
        self.cur_scale, self.dynamic, self.dtype = scale, False, torch.bfloat16


@dataclass
class fragment_address:
    numel: int
    start: int


class Logger:
    def info(self, *_):
        pass


for name in ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.fp16", "deepspeed.checkpoint"]:
    module(name)
module("deepspeed.utils", logger=Logger())
module("deepspeed.runtime.zero.config", ZeroStageEnum=ZeroStageEnum)
module("deepspeed.runtime.fp16.loss_scaler", LossScaler=LossScaler)
module("deepspeed.utils.tensor_fragment", fragment_address=fragment_address)
names = {
    name: name.lower()
    for name in "DS_VERSION OPTIMIZER_STATE_DICT SINGLE_PARTITION_OF_FP32_GROUPS FP32_FLAT_GROUPS ZERO_STAGE PARTITION_COUNT PARAM_SHAPES BUFFER_NAMES "
    "FROZEN_PARAM_SHAPES FROZEN_PARAM_FRAGMENTS AUTOEP_LAYERS_KEY AUTOEP_LAYERS_KEY_LEGACY AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY "
    "AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT".split()
}
module("deepspeed.checkpoint.constants", **names)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ridge = torch.nn.Linear(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.mix = torch.nn.Conv1d(3, 7, 3, bias=False)
        self.tied = torch.nn.Linear(7, 3, bias=False)
        self.tied_again = torch.nn.Linear(7, 3, bias=False)
        self.tied_again.weight = self.tied.weight
        self.frozen = torch.nn.Linear(3, 3)
        for parameter in self.frozen.parameters():
            parameter.requires_grad = False


def save(folder, tag, stage, half, ranks, prefix, keep_padding):
    torch.manual_seed(stage)
    net = Net()
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter)
    net.norm.running_mean.copy_(torch.randn(3))
    net.norm.num_batches_tracked.fill_(1234)
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    groups = [[(n, p) for n, p in named if p.ndim > 1], [(n, p) for n, p in named if p.ndim <= 1]]
    os.makedirs(f"{folder}/{tag}")
    flats, paddings = [], []
    for group in groups:
        flat = torch.cat([p.data.float().reshape(-1) for _, p in group])
        padding = -flat.numel() % (2 * ranks)
        flats.append(torch.cat([flat, torch.zeros(padding)]).chunk(ranks))
        paddings.append(padding)
    module_state = OrderedDict((k, v.to(half) if v.is_floating_point() else v) for k, v in net.state_dict().items())
    frozen = [(n, p) for n, p in net.named_parameters() if not p.requires_grad]
    state = dict(
        module=module_state,
        buffer_names=[name for name, _ in net.named_buffers()],
        optimizer=None,
        param_shapes=[OrderedDict((n, p.shape) for n, p in group) for group in groups],
        frozen_param_shapes=OrderedDict((n, p.shape) for n, p in frozen),
        shared_params={"tied_again.weight": "tied.weight"},
        frozen_param_fragments=OrderedDict((n, p.data.to(half)) for n, p in frozen),
        lr_scheduler=None,
        sparse_tensor_module_names=set(),
        skipped_steps=0,
        global_steps=3,
        dp_world_size=ranks,
        mp_world_size=1,
        ds_config={"zero_optimization": {"stage": stage}, "train_batch_size": 8},
        ds_version="0.14.0",
    )
    torch.save(state, f"{folder}/{tag}/mp_rank_00_model_states.pt")
    for rank in range(ranks):
        parts = []
        for flat, padding in zip(flats, paddings):
            part = flat[rank].clone()
            lost = 0 if keep_padding or rank < ranks - 1 else padding
            parts.append(part[: part.numel() - lost].clone())
        optimizer = dict(
            loss_scaler=LossScaler(1.0),
            dynamic_loss_scale=False,
            overflow=False,
            clip_grad=1.0,
            base_optimizer_state={"state": {0: {"step": 3, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            single_partition_of_fp32_groups=parts,
            zero_stage=ZeroStageEnum(stage),
            group_paddings=paddings,
            partition_count=[ranks, ranks] if stage == 2 else ranks,
            ds_version="0.14.0",
            param_slice_mappings=[OrderedDict((n, fragment_address(p.numel(), 0)) for n, p in group) for group in groups],
        )
        everything = dict(optimizer_state_dict=optimizer, ds_config=state["ds_config"], ds_version="0.14.0")
        torch.save(everything, f"{folder}/{tag}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if tag != "last":
        with open(f"{folder}/latest", "w") as file:
            file.write(tag)


def main():
    save("stage2", "global_step3", 2, torch.float16, 3, "", False)
    # The layout of the original training script: the tag is `last`, and its folder is the checkpoint.
    save("stage1", "last", 1, torch.bfloat16, 2, "bf16_", True)
    spec = importlib.util.spec_from_file_location("zero_to_fp32", sys.argv[1])
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    for folder, tag in [("stage2", None), ("stage1", "last")]:
        state = original.get_fp32_state_dict_from_zero_checkpoint(folder, tag)
        save_file({k: v.float().clone().contiguous() for k, v in state.items()}, f"{folder}.safetensors")


main()
