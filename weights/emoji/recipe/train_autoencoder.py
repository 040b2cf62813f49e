"""Train the autoencoder: 128x128 pictures to 16x16 latents of 4 channels and back (`AutoencoderKL`).

Writes `autoencoder/` (diffusers layout) into the work folder; `autoencoder.pt` beside it is the state to
resume from, written whole. The seed of a step's data is a function of the step, so a resumed run
sees the same pictures. After training the latents are whitened by folding an affine map into the
1x1 convolutions on both sides of the bottleneck: the denoiser gets zero mean and unit covariance
per channel, and `scaling_factor` is 1.

`--polish ../vae` goes on with the decoder alone, on latents without noise: the latents stay what the
denoiser knows. Its state is `polish.pt`.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from build_data import default_work
from diffusers import AutoencoderKL
from pictures import BACKGROUNDS, CANVAS_PX, Pictures
from precision import fast_autocast

CHANNELS = (16, 48, 96, 160)
CROP_PX = 96  # the first four fifths train on crops, where a pixel teaches more for its time
CROP_SHARE = 0.8
BATCH = 16
LEARNING_RATE = 1e-3
POLISH_LEARNING_RATE = 6e-4
KL_WEIGHT = 5e-4  # per latent element: leaves a noise of about 0.05 standard deviations


def new_autoencoder() -> AutoencoderKL:
    """Return the untrained autoencoder."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=CANVAS_PX,
        scaling_factor=1.0,
    )


def draw_batch(pictures: Pictures, step: int, size: int) -> torch.Tensor:
    """Return the step's own batch: (16, 3, size, size) in [-1, 1]."""
    chance = torch.Generator().manual_seed(1_000_003 * 17 + step)
    names = list(BACKGROUNDS)

    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=chance))

    batch = []
    for _ in range(BATCH):
        background = "white" if draw(2) else names[draw(len(names))]
        canvas = pictures.canvas(draw(len(pictures)), background, (draw(9, -8), draw(9, -8)))
        if draw(2):
            canvas = canvas.flip(-1)
        top, left = draw(CANVAS_PX - size + 1), draw(CANVAS_PX - size + 1)
        batch.append(canvas[:, top : top + size, left : left + size])
    return torch.stack(batch).to(memory_format=torch.channels_last)


def reconstruction_loss(decoded: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """L1, L2 and half the L1 of the differences along x and y."""
    error = decoded.float() - batch
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def loss_of(model: AutoencoderKL, batch: torch.Tensor) -> torch.Tensor:
    """Reconstruction through a noisy bottleneck plus the KL term."""
    with fast_autocast():
        posterior = model.encode(batch).latent_dist
        decoded = model.decode(posterior.sample()).sample
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
    return reconstruction_loss(decoded, batch) + KL_WEIGHT * kl.mean()


def polish_loss_of(model: AutoencoderKL, batch: torch.Tensor) -> torch.Tensor:
    """Reconstruction from the encoder's mean; the encoder is left as it is."""
    with fast_autocast():
        with torch.no_grad():
            latents = model.encode(batch).latent_dist.mean
        decoded = model.decode(latents).sample
    return reconstruction_loss(decoded, batch)


def learning_rate(highest: float, progress: float, step: int) -> float:
    """Warm up over 100 steps, hold, and fall linearly to zero over the last 40 %."""
    return highest * min(1.0, (step + 1) / 100, (1 - progress) / 0.4)


def whiten(model: AutoencoderKL, pictures: Pictures) -> None:
    """Fold zero mean and unit covariance of the latents into the bottleneck's 1x1 convolutions."""
    with torch.no_grad():
        means = [model.encode(draw_batch(pictures, 10_000_000 + k, CANVAS_PX)).latent_dist.mean for k in range(40)]
        flat = torch.cat(means).permute(1, 0, 2, 3).flatten(1).double()
        mean, covariance = flat.mean(1), flat.cov()
        values, vectors = torch.linalg.eigh(covariance)
        to_white = vectors @ torch.diag(values.rsqrt()) @ vectors.T  # symmetric: stays near the old axes
        before, after = model.quant_conv, model.post_quant_conv
        weight, bias = before.weight.double(), before.bias.double()
        weight[:4] = (to_white @ weight[:4].flatten(1)).view_as(weight[:4])
        bias[:4] = to_white @ (bias[:4] - mean)
        # The noise that training sampled stays per channel: scale its variance by the map's diagonal.
        bias[4:] += 2 * torch.log(torch.diag(to_white))
        inner = after.weight.double().flatten(1)
        after.bias.copy_(after.bias.double() + inner @ mean)
        after.weight.copy_((inner @ torch.linalg.inv(to_white)).view_as(after.weight))
        before.weight.copy_(weight)
        before.bias.copy_(bias)


def train(work: Path, num_steps: int, polish: Path | None = None) -> None:
    """Train, or go on training, and write the result; `polish` is the folder of an autoencoder whose decoder gets better."""
    pictures = Pictures(work, ("concept", "other"))
    torch.manual_seed(0)
    name, highest = ("polish", POLISH_LEARNING_RATE) if polish else ("autoencoder", LEARNING_RATE)
    model = AutoencoderKL.from_pretrained(polish, torch_dtype=torch.float32) if polish else new_autoencoder()
    model.to(memory_format=torch.channels_last)
    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()] if polish else list(model.parameters())
    optimiser = torch.optim.AdamW(trained, highest, betas=(0.9, 0.99), weight_decay=1e-4)
    state_file, first, trained_s = work / f"{name}.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, trained_s = state["step"], state["trained_s"]
    log = open(work / f"{name}.jsonl", "a", buffering=1)
    started, sum_loss = time.monotonic(), 0.0
    for step in range(first, num_steps):
        progress = step / num_steps
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(highest, progress, step)
        torch.manual_seed(step)
        batch = draw_batch(pictures, step, CROP_PX if progress < CROP_SHARE else CANVAS_PX)
        loss = polish_loss_of(model, batch) if polish else loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        sum_loss += loss.item()
        if (step + 1) % 50 == 0:
            pace_s = (time.monotonic() - started) / (step + 1 - first)
            row = {
                "step": step + 1,
                "of": num_steps,
                "loss": round(sum_loss / 50, 4),
                "left_min": round(pace_s * (num_steps - step - 1) / 60, 1),
            }
            print(json.dumps(row), file=log)
            sum_loss = 0.0
        if (step + 1) % 250 == 0 or step + 1 == num_steps:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            state["trained_s"] = trained_s + time.monotonic() - started
            torch.save(state, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
    model.eval()
    if not polish:
        whiten(model, pictures)
    model.save_pretrained(work / "autoencoder")
    hours = round((trained_s + time.monotonic() - started) / 3600, 2)
    (work / f"{name}.json").write_text(json.dumps({"num_pictures": num_steps * BATCH, "hours": hours}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--polish", type=Path, help="the folder of an autoencoder, such as weights/emoji/vae")
    arguments = parser.parse_args()
    train(arguments.work, arguments.steps, arguments.polish)
