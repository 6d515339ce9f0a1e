"""Pretrain the small vision transformer shipped in ``fedspan/data/builtin/bases/vit``, on generated glyphs only.

    python recipes/pretrain_vit.py --out src/fedspan/data/builtin/bases/vit

A glyph class is a fixed random drawing of lines, polylines and elliptic arcs, held as cubic Bezier strokes.
A picture of it moves every control point a little, applies a random affine map, draws the strokes with a
random thickness and brightness, sometimes at half the resolution, and adds noise. The model learns which
drawing it sees. No photograph, digit or letter is used: what the model knows about handwriting it learns
later, in the federation.

Shapes: C classes, N pictures, S strokes a glyph, P = 4 S control points. Coordinates are (x, y) in [-1, 1],
y down.
"""

import argparse
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

IMAGE_SIZE = 16
PATCH_SIZE = 4
NUM_STROKES = 5
PIECES_PER_STROKE = 4  # straight pieces that stand for one Bezier stroke when it is drawn


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The drawings of all classes; strokes that join share a point, so that jitter never tears them."""

    points: Tensor  # (C, P, 2) control points
    strokes: Tensor  # (C, S, 4) rows of ``points``, the four control points of each stroke
    drawn: Tensor  # (C, S) bool, False where a class has fewer strokes


def polyline(num_pieces: int, generator: torch.Generator) -> Tensor:
    """A chain of straight strokes as 3 k + 1 control points, (3 k + 1, 2), with corners well apart."""
    knots = [torch.rand(2, generator=generator) * 1.6 - 0.8]
    while len(knots) <= num_pieces:
        knot = torch.rand(2, generator=generator) * 1.6 - 0.8
        if (knot - knots[-1]).norm() > 0.5:
            knots.append(knot)
    steps = torch.arange(3)[:, None] / 3
    pieces = [a + steps * (b - a) for a, b in itertools.pairwise(knots)]
    return torch.cat([*pieces, knots[-1][None]])


def arc(num_pieces: int, generator: torch.Generator) -> Tensor:
    """An elliptic arc of at most a quarter turn per stroke, (3 k + 1, 2); the usual cubic approximation."""
    centre = torch.rand(2, generator=generator) * 0.8 - 0.4
    radii = torch.rand(2, generator=generator) * 0.45 + 0.25
    start = torch.rand((), generator=generator) * 2 * math.pi
    sense = 1 if torch.rand((), generator=generator) < 0.5 else -1
    turn = (torch.rand((), generator=generator) * 0.25 + 0.25) * math.pi * sense  # of one stroke
    reach = 4 / 3 * torch.tan(turn / 4)
    angles = start + turn * torch.arange(num_pieces + 1)
    on = torch.stack([angles.cos(), angles.sin()], dim=1)
    tangent = torch.stack([-angles.sin(), angles.cos()], dim=1) * reach
    pieces = [torch.stack([on[i], on[i] + tangent[i], on[i + 1] - tangent[i + 1]]) for i in range(num_pieces)]
    return torch.cat([*pieces, on[-1][None]]) * radii + centre


def make_glyphs(num_classes: int, generator: torch.Generator) -> Glyphs:
    """Draw ``num_classes`` random glyphs: one or two lines, polylines or arcs each."""
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected at least 2")
    points = torch.zeros(num_classes, 4 * NUM_STROKES, 2)
    strokes = torch.zeros(num_classes, NUM_STROKES, 4, dtype=torch.long)
    drawn = torch.zeros(num_classes, NUM_STROKES, dtype=torch.bool)
    for label in range(num_classes):
        num_parts = int(torch.randint(1, 3, (), generator=generator))
        first_point = first_stroke = 0
        for _ in range(num_parts):
            num_pieces = min(int(torch.randint(1, 5, (), generator=generator)), NUM_STROKES - first_stroke)
            if num_pieces == 0:
                break
            straight = bool(torch.rand((), generator=generator) < 0.5)
            part = (polyline if straight else arc)(min(num_pieces, 3) if straight else num_pieces, generator)
            num_pieces = len(part) // 3
            points[label, first_point : first_point + len(part)] = part
            for piece in range(num_pieces):
                strokes[label, first_stroke + piece] = torch.arange(4) + first_point + 3 * piece
            drawn[label, first_stroke : first_stroke + num_pieces] = True
            first_point, first_stroke = first_point + len(part), first_stroke + num_pieces
    return Glyphs(points, strokes, drawn)


def move(points: Tensor, generator: torch.Generator) -> Tensor:
    """Jitter each control point and apply one affine map a picture: rotation, shear, stretch, shift."""
    num = len(points)

    def uniform(width: float, *shape: int) -> Tensor:
        return (torch.rand(num, *shape, generator=generator) * 2 - 1) * width

    angle, shear, stretch = uniform(0.25), uniform(0.25), 0.95 + uniform(0.3, 2)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(num, 2, 2)
    slant = torch.eye(2).repeat(num, 1, 1)
    slant[:, 0, 1] = shear
    affine = rotation @ slant @ torch.diag_embed(stretch)
    jittered = points + 0.07 * torch.randn(points.shape, generator=generator)
    return jittered @ affine.transpose(1, 2) + uniform(0.2, 1, 2)


def distances(points: Tensor, strokes: Tensor, drawn: Tensor) -> Tensor:
    """Distance of each pixel's centre to the nearest drawn stroke, (N, IMAGE_SIZE, IMAGE_SIZE)."""
    num = len(points)
    rows = strokes.reshape(num, -1, 1).expand(-1, -1, 2)
    control = points.gather(1, rows).view(num, NUM_STROKES, 4, 2)
    t = torch.linspace(0, 1, PIECES_PER_STROKE + 1)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)  # (T, 4)
    curve = torch.einsum("tc,nscd->nstd", bernstein, control)
    start = curve[:, :, :-1].reshape(num, 1, -1, 2)
    along = (curve[:, :, 1:] - curve[:, :, :-1]).reshape(num, 1, -1, 2)
    axis = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(1, -1, 1, 2)
    offset = pixels - start  # (N, pixels, pieces, 2)
    share = ((offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-8)).clamp(0, 1)
    gap = (offset - share[..., None] * along).square().sum(-1)
    gap = gap.masked_fill(~drawn.repeat_interleave(PIECES_PER_STROKE, dim=1)[:, None], torch.inf)
    return gap.amin(dim=2).sqrt().view(num, IMAGE_SIZE, IMAGE_SIZE)


def draw(glyphs: Glyphs, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One random picture of each label's glyph, bright on dark: (N, 3, 16, 16) float32 in [0, 1]."""
    num = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num, 1, 1, generator=generator) * (high - low) + low

    gap = distances(move(glyphs.points[labels], generator), glyphs.strokes[labels], glyphs.drawn[labels])
    softness = uniform(0.03, 0.08)
    ink = torch.sigmoid((uniform(0.05, 0.16) - gap) / softness)
    coarse = functional.interpolate(
        functional.avg_pool2d(ink[:, None], 2), scale_factor=2, mode="bilinear", align_corners=False
    )[:, 0]
    ink = torch.where(uniform(0, 1) < 0.6, coarse, ink)
    ground = uniform(0.0, 0.15)
    picture = ground + (uniform(0.6, 1.1) - ground) * ink
    picture = picture + uniform(0.0, 0.05) * torch.randn(picture.shape, generator=generator)
    return picture.clamp(0, 1)[:, None].expand(-1, 3, -1, -1)


def normalise(pictures: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], the processor's mean and deviation of one half."""
    return pictures * 2 - 1


def sinusoidal_positions(grid: int, width: int) -> Tensor:
    """Two-dimensional sinusoids, (grid * grid, width): half of the channels for rows, half for columns."""
    quarter = width // 4
    frequencies = 1.0 / (10000.0 ** (torch.arange(quarter) / quarter))
    angles = torch.arange(grid).float()[:, None] * frequencies[None]  # (grid, quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    rows, columns = waves[:, None].expand(grid, grid, -1), waves[None].expand(grid, grid, -1)
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


def build(num_classes: int, hidden: int, layers: int, seed: int) -> ViTForImageClassification:
    """The untrained model; the caller's global random state is left as it was."""
    config = ViTConfig(
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, intermediate_size=4 * hidden, num_labels=num_classes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers initialises from the global generator only
        model = ViTForImageClassification(config)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def accuracy(model: ViTForImageClassification, glyphs: Glyphs, num: int, generator: torch.Generator) -> float:
    """Share of ``num`` fresh pictures whose glyph the model names."""
    model.eval()
    labels = torch.randint(len(glyphs.points), (num,), generator=generator)
    hits = 0
    for first in range(0, num, 256):
        batch = labels[first : first + 256]
        logits = model(pixel_values=normalise(draw(glyphs, batch, generator))).logits
        hits += int((logits.argmax(dim=1) == batch).sum())
    model.train()
    return hits / num


def cosine(progress: float) -> float:
    """Half a cosine wave from 1 at progress 0 to 0 at progress 1; constant before."""
    return 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress))


def train(
    model: ViTForImageClassification, glyphs: Glyphs, args: argparse.Namespace, generator: torch.Generator
) -> None:
    """AdamW on fresh pictures at every step, warm-up and cosine decay; prints one JSON line per 250 steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    warm_up = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm_up, cosine((i - warm_up) / (args.steps - warm_up))),
    )
    started, total = time.perf_counter(), 0.0
    model.train()
    for step in range(1, args.steps + 1):
        labels = torch.randint(len(glyphs.points), (args.batch_size,), generator=generator)
        logits = model(pixel_values=normalise(draw(glyphs, labels, generator))).logits
        loss = functional.cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 250 == 0 or step == args.steps:
            mean, total = total / (step % 250 or 250), 0.0
            seconds = time.perf_counter() - started
            print(json.dumps({"step": step, "loss": mean, "seconds": seconds}), flush=True)


def save(model: ViTForImageClassification, out: Path) -> None:
    """Write the backbone in bfloat16 without the glyph head, and its processor, as a Hugging Face folder."""
    state = model.state_dict()
    backbone = {k: v.to(torch.bfloat16) for k, v in state.items() if not k.startswith("classifier.")}
    model.config.num_labels = 2  # the library's default: glyph numbers mean nothing to who loads the folder
    model.to(torch.bfloat16).save_pretrained(out, state_dict=backbone)
    # The file is half the size in bfloat16; computing in float32 is what a loader should do by default.
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(out)


def main() -> None:
    """Read the command line, train on one thread, write the folder."""
    parser = argparse.ArgumentParser(description="pretrain the shipped ViT on generated glyphs")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=192)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    glyphs = make_glyphs(args.classes, generator)
    model = build(args.classes, args.hidden, args.layers, args.seed)
    train(model, glyphs, args, generator)
    print(json.dumps({"fresh_picture_accuracy": accuracy(model, glyphs, 4096, generator)}), flush=True)
    save(model, args.out)


if __name__ == "__main__":
    main()
