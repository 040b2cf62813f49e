"""Train the denoiser: flow matching in the autoencoder's latents, conditioned on MiniLM embeddings.

Reads `autoencoder/` of the work folder, caches there, shard by shard, the latents and caption embeddings
of the scenes (`scenes.py`) that it learns from, writes `denoiser/` (the EMA, diffusers layout) when done
or stopped; `denoiser.pt` is the state to resume from, written whole every few minutes. `--steps` may be
changed between runs: the learning rate holds until the last quarter and then falls to zero. A state
without its optimiser, and the shipped model (`--start-from ..`), go on with a warm-up.

Flow matching: Lipman et al. (2022), https://arxiv.org/abs/2210.02747; logit-normal times: Esser et
al. (2024), https://arxiv.org/abs/2403.03206, section 3.1.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from build_data import default_work
from captions import descriptions_for_denoiser, telling_tags
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from optimiser import Optimiser
from pictures import Pictures
from precision import fast_autocast
from rich.progress import track
from scenes import Colours, Scene, Scenes, Thing
from text import embed, load_text_encoder

RECIPE = Path(__file__).parent
SHARD_SCENES = 2000
NUM_SHARDS = 32
CAPTIONS_PER_SCENE = 2
BATCH = 128
LEARNING_RATE = 1e-3
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
DECAY_SHARE = 0.25
SINGLE_SHARE = 0.55
UNSURE_SHARE = 0.5  # of the single things
MAX_UNSURE = 0.55  # of every token's embedding that is others', shared by two of them
MAX_STRAYS = 0.4  # of the tokens that speak of something else


def new_denoiser() -> UNet2DConditionModel:
    """Return the untrained denoiser: 16x16x4 latents, attention on the lower two levels.

    `addition_embed_type="text"` pools the caption into the time embedding: what the picture is
    reaches every layer, and cross-attention is left with where and how.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 160, 256),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(4, 5, 8),  # numbers of heads: diffusers keeps the old name
        cross_attention_dim=384,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
    )


def drawn_from(work: Path, autoencoder: AutoencoderKL) -> str:
    """Return what the latents depend on, as a hash: the pictures' list, how scenes are drawn, the encoder's weights."""
    digest = hashlib.sha256((work / "pictures.json").read_bytes() + (RECIPE / "scenes.py").read_bytes())
    for name, value in sorted(autoencoder.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:8]


def said_from(work: Path, text_encoder: torch.nn.Module) -> str:
    """Return what the captions depend on, as a hash: the pictures' list, what is said of scenes, the text encoder's weights."""
    digest = hashlib.sha256((work / "pictures.json").read_bytes())
    for name in ("scenes.py", "captions.py", "descriptions.txt"):
        digest.update((RECIPE / name).read_bytes())
    for _, value in sorted(text_encoder.state_dict().items()):
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:8]


def draw_scenes(number: int, scenes: Scenes) -> list[Scene]:
    """Return shard `number`'s own scenes."""
    chance = random.Random(1_000_003 * (number + 1))
    return [scenes.draw(chance) for _ in range(SHARD_SCENES)]


@torch.no_grad()
def paint_shard(number: int, scenes: Scenes, autoencoder: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Paint a shard's scenes and encode them.

    Returns:
        `latents` (S, 4, 16, 16) float16 and `single` (S,): whether a scene is one thing as it was drawn.
    """
    drawn, latents = draw_scenes(number, scenes), []
    with fast_autocast():
        for start in track(range(0, len(drawn), 32), description=f"shard {number}, latents"):
            batch = torch.stack([scenes.paint(scene) for scene in drawn[start : start + 32]])
            latents.append(autoencoder.encode(batch.to(memory_format=torch.channels_last)).latent_dist.mean.half())
    single = torch.tensor([scene.things == (Thing(scene.things[0].picture),) for scene in drawn])
    return {"latents": torch.cat(latents), "single": single}


def describe_shard(number: int, scenes: Scenes, encoder: tuple) -> dict[str, torch.Tensor]:
    """Describe a shard's scenes and embed what is said.

    Returns:
        `embeddings` (C, T, 384) float16 and `rows` (S, 2): each scene's captions.
    """
    chance, texts = random.Random(2_000_003 * (number + 1)), {}
    rows = [
        [texts.setdefault(scenes.describe(scene, chance), len(texts)) for _ in range(CAPTIONS_PER_SCENE)]
        for scene in draw_scenes(number, scenes)
    ]
    every = list(texts)
    blocks = track(range(0, len(every), 64), description=f"shard {number}, captions")
    with fast_autocast():
        found = [embed(encoder, every[start : start + 64]).half() for start in blocks]
    return {"embeddings": torch.cat(found), "rows": torch.tensor(rows)}


class Shards:
    """All scenes to learn from: made once, each shard in files of its own, and read through memory maps."""

    def __init__(self, work: Path, num_shards: int, encoder: tuple, num_threads: int = 1):
        """Make what is missing or belongs to other pictures, captions or encoders."""
        folder = work / "shards"
        folder.mkdir(exist_ok=True)
        autoencoder = AutoencoderKL.from_pretrained(work / "autoencoder").to(memory_format=torch.channels_last)
        painted, said = drawn_from(work, autoencoder), said_from(work, encoder[1])
        pictures = Pictures(work, ("concept",))
        scenes = Scenes(pictures, Colours(pictures), telling_tags(pictures.rows), descriptions_for_denoiser())

        def make(number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            return (
                kept(folder / f"painted-{painted}-{number:03}.pt", lambda: paint_shard(number, scenes, autoencoder)),
                kept(folder / f"said-{said}-{number:03}.pt", lambda: describe_shard(number, scenes, encoder)),
            )

        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            parts = list(executor.map(make, range(num_shards)))
        self.latents = torch.cat([part["latents"] for part, _ in parts])
        self.shard_of = torch.cat([torch.full((len(part["latents"]),), n) for n, (part, _) in enumerate(parts)])
        self.embeddings = [part["embeddings"] for _, part in parts]
        self.rows = torch.cat([part["rows"] for _, part in parts])
        single = torch.cat([part["single"] for part, _ in parts])
        self.single, self.composed = single.nonzero()[:, 0], (~single).nonzero()[:, 0]

    def draw(self, num: int, single_share: float, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return latents (num, 4, 16, 16) and embeddings (num, T, 384), float32, and which captions are left out (num,)."""
        num_single = round(num * single_share)
        picked = [
            rows[torch.randint(len(rows), (amount,), generator=chance)]
            for rows, amount in ((self.single, num_single), (self.composed, num - num_single))
            if amount
        ]
        picked = torch.cat(picked)
        which = torch.randint(self.rows.shape[1], (num,), generator=chance)
        rows, shards = self.rows[picked, which], self.shard_of[picked]
        words = [self.embeddings[shard][row] for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        embeddings = torch.stack(words).float()
        embeddings[:num_single] = make_unsure(embeddings[:num_single], chance)
        return self.latents[picked].float(), embeddings, torch.rand(num, generator=chance) < CAPTION_DROPOUT


def kept(file: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make tensors once: read them from a file, or make them and write it whole."""
    if not file.exists():
        torch.save(make(), file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)
    return torch.load(file, weights_only=True, mmap=True)


def make_unsure(words: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Blend the embeddings of some captions with less of two others', and change some tokens for a third's, (B, T, 384).

    So a text encoder says that it is unsure: every token of it, and its tokens among themselves. The denoiser learns to draw
    what is meant most, not the mean of all.
    """

    def some(most: float) -> torch.Tensor:
        amount = most * torch.rand(len(words), generator=chance) * (torch.rand(len(words), generator=chance) < UNSURE_SHARE)
        return amount[:, None, None]

    weight, strays = some(MAX_UNSURE), some(MAX_STRAYS)
    split = 0.35 + 0.3 * torch.rand(len(words), 1, 1, generator=chance)
    one, other, third = (words[torch.randperm(len(words), generator=chance)] for _ in range(3))
    blended = (1 - weight) * words + weight * (split * one + (1 - split) * other)
    return torch.where(torch.rand(*words.shape[:2], 1, generator=chance) < strays, third, blended)


def make_noisy(latents: torch.Tensor, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents (B, 4, 16, 16), their logit-normal times in [0, 1] (B,) and the velocities to learn."""
    sigma = torch.sigmoid(torch.randn(len(latents), generator=chance))
    noise = torch.randn(latents.shape, generator=chance)
    place = sigma[:, None, None, None]
    return ((1 - place) * latents + place * noise).to(memory_format=torch.channels_last), sigma, noise - latents


class Workers:
    """Threads that share the work of a step: a core each does more than all cores on every operation.

    Two cores do 110 pictures a second in two threads of one core, 94 in one thread of two.
    """

    def __init__(self, model: torch.nn.Module, num: int):
        """Start `num` threads for a model."""
        self.model, self.num = model, num
        self.parameters = list(model.parameters())
        self.executor = ThreadPoolExecutor(num, initializer=torch.set_num_threads, initargs=(1,))

    def _gradients(self, part: tuple[torch.Tensor, ...]) -> tuple[float, tuple[torch.Tensor, ...]]:
        noisy, sigma, wanted, words = part
        with fast_autocast():
            velocity = self.model(noisy, sigma * 1000, words).sample
        loss = (velocity.float() - wanted).square().mean()
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def learn(self, noisy: torch.Tensor, sigma: torch.Tensor, wanted: torch.Tensor, words: torch.Tensor) -> float:
        """Set every parameter's gradient, of the squared error of the velocity, and return that error."""
        parts = zip(*(values.chunk(self.num) for values in (noisy, sigma, wanted, words)), strict=True)
        losses, gradients = zip(*self.executor.map(self._gradients, parts), strict=True)
        total = list(gradients[0])
        for more in gradients[1:]:
            torch._foreach_add_(total, more)
        torch._foreach_div_(total, len(losses))
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        return sum(losses) / len(losses)


def learning_rate(step: int, warmed_from: int, num_steps: int) -> float:
    """Warm up over 300 steps, hold, and fall linearly to zero over the last quarter."""
    return LEARNING_RATE * min(1.0, (step + 1 - warmed_from) / 300, (num_steps - step) / (DECAY_SHARE * num_steps))


class Training:
    """Everything that a resumed run needs, and how it is stored."""

    def __init__(self, work: Path, fresh_optimiser: bool, start_from: Path | None, num_threads: int):
        """Read `denoiser.pt` and go on; where there is none start from a model's folder, or afresh."""
        torch.manual_seed(0)
        self.file = work / "denoiser.pt"
        fresh = UNet2DConditionModel.from_pretrained(start_from / "unet").float() if start_from else new_denoiser()
        self.model = fresh.train().to(memory_format=torch.channels_last)
        self.model.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on a CPU
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimiser = Optimiser(self.model, num_threads)
        self.workers = Workers(self.model, num_threads)
        self.step = self.warmed_from = 0
        self.trained_s = 0.0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.ema, self.step, self.warmed_from = state["ema"], state["step"], state["warmed_from"]
            self.trained_s = state["trained_s"]
            if fresh_optimiser or "optimiser" not in state:
                self.warmed_from = self.step
            else:
                self.optimiser.load_state_dict(state["optimiser"])

    def save(self) -> None:
        """Write the whole state beside its place and move it in."""
        state = {"model": self.model.state_dict(), "ema": self.ema, "optimiser": self.optimiser.state_dict()}
        state |= {"step": self.step, "warmed_from": self.warmed_from, "trained_s": self.trained_s}
        torch.save(state, self.file.with_suffix(".part"))
        os.replace(self.file.with_suffix(".part"), self.file)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average one step towards the weights; early averages forget faster."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        averages, values = list(self.ema.values()), list(self.model.state_dict().values())
        torch._foreach_lerp_(averages, values, 1 - decay)

    def export(self, folder: Path) -> None:
        """Write the EMA in diffusers' layout, fp32."""
        model = new_denoiser()
        model.load_state_dict(self.ema)
        model.save_pretrained(folder)


def train(
    work: Path,
    num_steps: int,
    fresh_optimiser: bool = False,
    start_from: Path | None = None,
    num_shards: int = NUM_SHARDS,
    num_threads: int = 1,
    single_share: float = SINGLE_SHARE,
) -> None:
    """Train, or go on training; SIGTERM and Ctrl-C save and leave."""
    parts = {"vae": "autoencoder", "tokenizer": "tokenizer", "text_encoder": "text_encoder"}
    if (work / "text_encoder").exists():
        del parts["tokenizer"]  # its own, or MiniLM's
    for part, name in parts.items():
        if start_from and not (work / name).exists():
            shutil.copytree(start_from / part, work / name)
    encoder = load_text_encoder(work)
    shards = Shards(work, num_shards, encoder, num_threads)
    silence = embed(encoder, [""])
    torch.set_num_threads(1)
    training = Training(work, fresh_optimiser, start_from, num_threads)
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    log = open(work / "denoiser.jsonl", "a", buffering=1)
    started, first, sum_loss = time.monotonic(), training.step, 0.0
    saved_at = started
    while training.step < num_steps and not stop:
        chance = torch.Generator().manual_seed(training.step)
        latents, words, silent = shards.draw(BATCH, single_share, chance)
        words[silent] = silence
        sum_loss += training.workers.learn(*make_noisy(latents, chance), words)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimiser.step(learning_rate(training.step, training.warmed_from, num_steps), training.workers.executor)
        training.step += 1
        training.update_ema()
        if training.step % 50 == 0:
            pace_s = (time.monotonic() - started) / (training.step - first)
            row = {
                "step": training.step,
                "of": num_steps,
                "loss": round(sum_loss / 50, 4),
                "pictures_per_s": round(BATCH / pace_s, 1),
            }
            print(json.dumps(row | {"left_min": round(pace_s * (num_steps - training.step) / 60, 1)}), file=log)
            sum_loss = 0.0
        if time.monotonic() - saved_at > 240:
            training.trained_s += time.monotonic() - saved_at
            training.save()
            saved_at = time.monotonic()
    training.trained_s += time.monotonic() - saved_at
    training.save()
    training.export(work / "denoiser")
    facts = {"num_pictures": training.step * BATCH, "hours": round(training.trained_s / 3600, 2)}
    (work / "denoiser.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--shards", type=int, default=NUM_SHARDS, help=f"of {SHARD_SCENES} scenes each, made once")
    parser.add_argument("--singles", type=float, default=SINGLE_SHARE, help="the share of scenes of one thing, 0 to 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="each takes its part of every batch")
    parser.add_argument("--fresh-optimiser", action="store_true")
    parser.add_argument(
        "--start-from", type=Path, help="the folder of a model, such as weights/emoji; then --fresh-optimiser is meant"
    )
    arguments = parser.parse_args()
    start = (arguments.steps, arguments.fresh_optimiser, arguments.start_from)
    train(arguments.work, *start, arguments.shards, arguments.threads, arguments.singles)
