"""What the processes of ``test_sharded`` do; importable by name from a process started anew."""

import os
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.distributed.fsdp import fully_shard
from two_processes import environment_of

import ocm
from ocm import checkpoints
from ocm.training.processes import shard

WIDTH = 8
SETTINGS = ocm.TrainingSettings(
    num_steps=6, batch_size=4, learning_rate=0.05, warmup_steps=1, ema_decay=0.5
)
HEADS = {
    "vjp": (ocm.OptimalCovarianceMatching, {"num_probes": 2}),
    "jvp": (ocm.OptimalCovarianceMatching, {"mode": "jvp"}),
    "npr": (ocm.NPR, {}),
}


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sharded(unet):
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block)
    return fully_shard(unet)


def train_heads(unet, directory=None, **changes):
    """Return the losses and the weights of a head of each kind, by name."""
    denoiser = ocm.Denoiser(unet, ocm.cosine())
    found = {}
    for name, (kind, options) in HEADS.items():
        head = ocm.CovarianceHead(8, 2, 4)
        covariance = kind(denoiser, head, ocm.Parameterisation(0.5, positive=True), **options)
        losses = ocm.train_head(
            covariance,
            random(20, 2, 4, 4, seed=1),
            ocm.TrainingSettings(**{**vars(SETTINGS), **changes}),
            conditions={"encoder_hidden_states": random(20, 3, WIDTH, seed=2)},
            null_conditions={"encoder_hidden_states": random(1, 3, WIDTH, seed=3)},
            directory=None if directory is None else Path(directory) / name,
            progress=False,
        )
        found[name] = losses, {key: value.tolist() for key, value in head.state_dict().items()}
    return found


def train_sharded(connection, rank, port, directory):
    """Train as one of two processes, each of which holds half of the backbone's weights."""
    torch.set_num_threads(1)
    os.environ.update(environment_of(rank, port))
    torch.distributed.init_process_group("gloo")
    whole = sum(p.numel() for p in make_unet().parameters())
    by_hand, by_us = sharded(make_unet()), make_unet()
    shard(by_us, "cpu")
    parts = [
        sum(p.to_local().numel() for p in unet.parameters()) / whole for unet in (by_hand, by_us)
    ]
    results = {
        "parts": parts,
        "sharded": train_heads(by_hand),
        "restored": train_heads(by_us, directory),
        "shard": train_heads(by_us),
        "copied": train_heads(torch.nn.parallel.DistributedDataParallel(make_unet())),
    }
    denoiser = ocm.Denoiser(by_us, ocm.cosine())
    by_us.requires_grad_(True)
    checkpoint = checkpoints.Checkpoint(denoiser, (2, 4, 4), levels=256, data="")
    for name, act in {
        "training": lambda: ocm.train_denoiser(denoiser, random(4, 2, 4, 4, seed=1), SETTINGS),
        "writing": lambda: checkpoints.save(checkpoint, Path(directory) / "checkpoint"),
        "attached": lambda: ocm.attach(by_us).save_pretrained(Path(directory) / "attached"),
    }.items():
        try:
            act()
        except ValueError as error:
            results[name] = str(error)
    connection.send(results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
