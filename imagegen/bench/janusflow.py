"""What JanusFlow's prompt cache is worth: a step with the prompt's keys and values kept, in turn with one that reads all anew.

The published make with fewer layers, on a CPU a quarter as wide, and random weights: nothing is downloaded.
"""

import statistics
import time
from typing import Any

import torch

from imagegen.families.diffusion import quiet
from imagegen.measure import synchronise

LANGUAGE: dict[str, Any] = {"vocab_size": 1024, "max_position_embeddings": 2048, "num_hidden_layers": 4}
WIDTHS = {"cuda": (2048, 5632, 16, 768), "cpu": (512, 1408, 4, 192), "tiny": (32, 48, 4, 16)}
PROMPT_TOKENS = (16, 64, 256)


def make_network(*, tiny: bool, device: str, dtype: torch.dtype) -> Any:
    """Return a network of that make with random weights: 24x24 image tokens; tiny: 4x4 and next to no width."""
    from imagegen.families.janusflow import JanusFlowTransformer

    width, inner, heads, channels = WIDTHS["tiny" if tiny else torch.device(device).type]
    blocks = {"block_out_channels": [channels], "layers_in_middle": 2, "hidden_size": width, "norm_eps": 1e-6}
    encoder = blocks | {"input_channels": 4, "kernel_size": 2, "stride": 2, "padding": 0}
    decoder = blocks | {"in_channels": channels, "out_channels": 4, "upsamples": 1}
    language = LANGUAGE | {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = JanusFlowTransformer(language, encoder, decoder, 4 if tiny else 24)
        for name, weight in network.named_parameters():
            if "channelwise_norm" in name:  # zero at birth, and then without effect
                torch.nn.init.normal_(weight, std=0.1)
    return network.to(device, dtype).eval()


@torch.no_grad()
def measure_janusflow(source: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Time a guided step both ways in turn, for prompts of several lengths.

    Returns:
        `rows`: for each number of prompt tokens the median seconds of both ways, what reading the prompt once takes,
        their ratio, and the largest difference of their velocities over the largest velocity.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    network = make_network(tiny=tiny, device=device, dtype=dtype)
    rows = {str(tokens): _in_turn(network, tokens, runs=2 if tiny else 15) for tokens in PROMPT_TOKENS}
    return {"layers": len(network.language_model.layers), "dtype": str(dtype).removeprefix("torch."), "rows": rows}


def _in_turn(network: Any, tokens: int, runs: int) -> dict[str, Any]:
    from imagegen.families import janus
    from imagegen.families.janusflow import context_of

    device = network.device
    ids = torch.arange(tokens, device=device)[None] % network.language_model.config.vocab_size
    positions = torch.arange(tokens, device=device)[None]
    prompts = janus.Prompts(ids, torch.ones_like(ids, dtype=torch.bool), positions, torch.tensor([tokens], device=device))
    sample = torch.randn(1, 4, *[network.config.sample_size] * 2, generator=torch.Generator().manual_seed(1))
    sample, moment = sample.to(device, network.dtype), torch.tensor(500.0, device=device)
    kept = context_of(network, prompts, guided=True)
    ways = {
        "reading the prompt": lambda: network.read_prompts(prompts),
        "prompt kept": lambda: network(sample, moment, **kept, return_dict=False)[0],
        "all read anew": lambda: recompute(network, prompts, sample, moment),
    }
    spent: dict[str, list[float]] = {way: [] for way in ways}
    made = {}
    for run in range(runs + 1):
        for way, compute in ways.items():
            synchronise(device)
            started = time.perf_counter()
            made[way] = compute()
            synchronise(device)
            if run:  # the first one warms up
                spent[way].append(time.perf_counter() - started)
    seconds = {way: statistics.median(values) for way, values in spent.items()}
    plain = made["all read anew"].float()
    error = ((made["prompt kept"].float() - plain).abs().max() / plain.abs().max()).item()
    return {"seconds": seconds, "ratio": seconds["all read anew"] / seconds["prompt kept"], "error": error}


def recompute(network: Any, prompts: Any, latents: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return both velocities of a step, (without, with the prompt), the plain way: no cache, every token of both rows read anew.

    Args:
        network: JanusFlow's.
        prompts: of one picture, without padding.
        latents: (1, 4, h, w).
        moment: (), 1000 times the time.
    """
    length = prompts.ids.shape[1]
    features, embedded = network.vision_gen_enc_model(torch.cat([latents] * 2), moment.expand(2))
    tokens = network.vision_gen_enc_aligner(features.flatten(2).mT)
    text = network.language_model.embed_tokens(prompts.ids).expand(2, -1, -1)
    inputs = torch.cat([text, embedded[:, None], tokens], dim=1)
    total = inputs.shape[1]
    seen = torch.ones(2, total, dtype=torch.bool, device=latents.device)
    seen[0, 1:length] = False
    own = torch.eye(total, dtype=torch.bool, device=latents.device)
    mask = (seen[:, None] & torch.ones_like(own).tril()) | own
    positions = torch.arange(total, device=latents.device)[None]
    states = network.language_model(inputs_embeds=inputs, attention_mask=mask[:, None], position_ids=positions, use_cache=False)
    states = network.vision_gen_dec_aligner(network.vision_gen_dec_aligner_norm(states.last_hidden_state[:, length + 1 :]))
    return network.vision_gen_dec_model(states.mT.unflatten(2, features.shape[-2:]), features, embedded)
