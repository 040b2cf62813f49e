"""How much of a prompt the text encoders read. Knows tokenizers and their limits, not what they are for."""

import inspect
from typing import Any


def readers(pipeline: Any) -> list[tuple[Any, int]]:
    """Return a pipeline's tokenizers, each with the tokens that it passes on, markers included."""
    parts, call = pipeline.components, inspect.signature(type(pipeline).__call__).parameters
    longest = call["max_sequence_length"].default if "max_sequence_length" in call else None
    found = []
    for suffix in ("", "_2", "_3", "_4"):
        tokenizer, encoder = parts.get(f"tokenizer{suffix}"), parts.get(f"text_encoder{suffix}")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        if tokenizer is None or encoder is None:
            continue
        limit = longest if isinstance(longest, int) else tokenizer.model_max_length
        if type(encoder).__name__.startswith("CLIP"):  # it has so many places for tokens, whatever the others read
            limit = min(limit, tokenizer.model_max_length)
        found.append((tokenizer, limit))
    return found


def opening_length(tokenizer: Any) -> int:
    """Return how many tokens a chat template puts before a prompt; 0 where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return 0
    mark = "PROMPT"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text.partition(mark)[0]).input_ids)


def cut_text(pipeline: Any, prompt: str, chat: bool = False) -> tuple[int, str]:
    """Return how many tokens the farthest-reading text encoder reads, and the end of the prompt that it will not see.

    Args:
        pipeline: the model's.
        prompt: what the user wrote.
        chat: the encoder reads it inside the tokenizer's chat template.

    Raises:
        RequestError: the model reads a whole prompt or none, and this one is too long.
    """
    if hasattr(pipeline, "max_prompt_tokens"):
        pipeline.encode_prompt([prompt])
        return pipeline.max_prompt_tokens, ""
    found = [(tokenizer, limit - opening_length(tokenizer) if chat else limit) for tokenizer, limit in readers(pipeline)]
    if not found:
        return 0, ""
    tokenizer, limit = max(found, key=lambda pair: pair[1])
    tokens = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True, return_special_tokens_mask=True)
    if len(tokens.input_ids) <= limit:
        return limit, ""
    closing = 1 if tokens.special_tokens_mask[-1] else 0  # it takes the last place
    last_read = tokens.offset_mapping[limit - 1 - closing][1]
    return limit, prompt[last_read:].strip()
