"""Pretrain a small vision transformer on a CIFAR-10 subset: the base of the image benchmarks.

    python benchmarks/images/pretrain_cifar_vit.py --cifar CIFAR.npz --out benchmarks/bases/cifar-vit

The input is one npz with ``{train,test}_jpeg`` (concatenated JPEG bytes), ``_off`` (offsets) and ``_y``
(labels). The result is a Hugging Face folder (config, preprocessor, float32 safetensors) that also holds
``pretraining.json``, the settings and figures of the run.

Fifteen thousand images and one CPU thread are little for a transformer; three things carry the result:

* linear layers that start with unit gain and sinusoidal positions: with the library's own initialisation
  the first epochs are spent growing the weights;
* token dropping (Liu et al. 2022, "PatchDropout", arXiv:2208.07220): most epochs see a random part of the
  patches of each image, which costs less and regularises as erasing would; the last epochs see them all;
* random affine crops, flips, colour and greyscale jitter.
"""

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

IMAGE_SIZE = 64
PATCH_SIZE = 8
NUM_CLASSES = 10
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def decode_split(archive: Any, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 64, 64) uint8 and labels (N,) of one split, resized as the saved processor does."""
    data, offsets, labels = archive[f"{split}_jpeg"].tobytes(), archive[f"{split}_off"], archive[f"{split}_y"]
    images = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for i in range(len(labels)):
        picture = Image.open(io.BytesIO(data[int(offsets[i]) : int(offsets[i + 1])])).convert("RGB")
        images[i] = np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels.astype(np.int64))


def normalise(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], the processor's mean and deviation of one half."""
    return images.float().div_(127.5).sub_(1.0)


def sinusoidal_positions(grid: int, width: int) -> Tensor:
    """Two-dimensional sinusoids, (grid * grid, width): half of the channels for rows, half for columns."""
    quarter = width // 4
    frequencies = 1.0 / (10000.0 ** (torch.arange(quarter) / quarter))
    angles = torch.arange(grid).float()[:, None] * frequencies[None]  # (grid, quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, width)


@torch.no_grad()
def initialise(model: ViTForImageClassification, generator: torch.Generator) -> None:
    """Overwrite in place the library's start, whose deviation of 0.02 is far too small at this width."""
    for module in model.vit.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
    patches = model.vit.embeddings.patch_embeddings.projection.weight
    patches.normal_(0.0, 2.0 * patches[0].numel() ** -0.5, generator=generator)
    positions = model.vit.embeddings.position_embeddings
    positions[:, 1:] = sinusoidal_positions(IMAGE_SIZE // PATCH_SIZE, positions.shape[2])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine crop and flip, colour and greyscale jitter; (N, 3, H, W) in [-1, 1]."""
    num = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(num, *shape, generator=generator) * (high - low) + low

    scale, angle = uniform(0.75, 1.05), uniform(-0.15, 0.15)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shift = uniform(-0.2, 0.2, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], dim=1).view(num, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    out = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    grey = out.mean(dim=1, keepdim=True)
    saturation = uniform(0.5, 1.5, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) > 0.15)  # zero: a greyscale picture
    out = grey + saturation * (out - grey)
    return out * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.25, 0.25, 1, 1, 1)


def logits_of_part(model: ViTForImageClassification, pixels: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Class logits when each image shows only ``keep`` of its patches, drawn without replacement."""
    tokens = model.vit.embeddings(pixels)  # (N, 1 + patches, width)
    num_patches = tokens.shape[1] - 1
    if keep < num_patches:
        order = torch.rand(len(tokens), num_patches, generator=generator).argsort(dim=1)[:, :keep] + 1
        kept = tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], kept], dim=1)
    for layer in model.vit.layers:
        tokens = layer(tokens, None)
    return model.classifier(model.vit.layernorm(tokens)[:, 0])  # type: ignore[no-any-return]


def cosine(progress: float) -> float:
    """Half a cosine wave from 1 at progress 0 to 0 at progress 1; constant before."""
    return 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress))


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` (uint8) whose most likely class is right: all patches, full precision."""
    model.eval()
    hits = 0
    for first in range(0, len(labels), 256):
        logits = model(pixel_values=normalise(images[first : first + 256])).logits
        hits += int((logits.argmax(dim=1) == labels[first : first + 256]).sum())
    model.train()
    return hits / len(labels)


def save(model: ViTForImageClassification, out: Path, figures: dict[str, Any]) -> None:
    """Write the Hugging Face folder and its figures; an earlier checkpoint in ``out`` is replaced."""
    model.save_pretrained(out)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(figures, indent=2) + "\n")


def build(args: argparse.Namespace, generator: torch.Generator) -> ViTForImageClassification:
    """The untrained model of the command line's size."""
    config = ViTConfig(
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32, intermediate_size=4 * args.hidden,
        id2label=dict(enumerate(CLASS_NAMES)), label2id={name: i for i, name in enumerate(CLASS_NAMES)},
        attn_implementation="eager",  # on a CPU in bf16 the fused attention is slower at this length
    )  # fmt: skip
    torch.manual_seed(args.seed)  # transformers initialises from the global generator only
    model = ViTForImageClassification(config)
    initialise(model, generator)
    return model


def train(model: ViTForImageClassification, args: argparse.Namespace, generator: torch.Generator) -> None:
    """AdamW with warm-up and cosine decay; ``epochs`` on parts of the patches, ``full_epochs`` on all."""
    with np.load(args.cifar) as archive:
        images, labels = decode_split(archive, "train")
        test_images, test_labels = decode_split(archive, "test")
    num_patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    num_epochs, per_epoch = args.epochs + args.full_epochs, len(images) // args.batch_size
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    total, warm_up = num_epochs * per_epoch, max(1, num_epochs * per_epoch // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm_up, cosine((i - warm_up) / (total - warm_up))),
    )
    started, history = time.perf_counter(), []
    for epoch in range(num_epochs):
        keep = args.keep if epoch < args.epochs else num_patches
        losses = []
        order = torch.randperm(len(images), generator=generator)[: per_epoch * args.batch_size]
        for rows in order.view(per_epoch, args.batch_size):
            pixels = augment(normalise(images[rows]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = logits_of_part(model, pixels, keep, generator)
            loss = functional.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        mean_loss = sum(losses) / len(losses)
        record: dict[str, Any] = {"epoch": epoch + 1, "patches": keep, "train_loss": mean_loss}
        last = epoch + 1 == num_epochs
        if last or (epoch + 1) % args.save_every == 0:
            record["test_accuracy"] = accuracy(model, test_images, test_labels)
        record["seconds"] = round(time.perf_counter() - started, 1)
        history.append(record)
        print(json.dumps(record), flush=True)
        if "test_accuracy" in record:
            settings = {k: v for k, v in vars(args).items() if k not in ("cifar", "out")}
            save(model, args.out, {
                "data": args.cifar.name, "num_train": len(labels), "num_test": len(test_labels),
                "test_accuracy": record["test_accuracy"], "finished": last, "epochs_done": epoch + 1,
                "train_seconds": record["seconds"],
                "num_parameters": sum(p.numel() for p in model.parameters()),
                "settings": settings, "history": history,
            })  # fmt: skip


def main() -> None:
    """Read the command line, train on one thread, write the folder."""
    parser = argparse.ArgumentParser(description="pretrain the image benchmarks' ViT on a CIFAR-10 subset")
    parser.add_argument("--cifar", type=Path, required=True, help="npz with train_jpeg, train_off, train_y, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=32, help="epochs on a random part of the patches")
    parser.add_argument("--full-epochs", type=int, default=3, help="last epochs, on all patches")
    parser.add_argument("--keep", type=int, default=24, help="patches shown of 64 in the first epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--save-every", type=int, default=5, help="epochs between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    train(build(args, generator), args, generator)


if __name__ == "__main__":
    main()
