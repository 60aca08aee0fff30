"""A text that the model writes itself: what it is used for, where no text is at hand."""

from pathlib import Path

import torch
from torch import Tensor

from compress_tools.errors import CheckpointError, UnsupportedArchitectureError
from compress_tools.text_file import in_words

# Windows that are written side by side.
TOGETHER = 16


def self_generated(path: Path, count: int, window: int, dtype: torch.dtype, seed: int, **loading: bool) -> Tensor:
    """Windows ``[N, window]`` of at least ``count`` tokens, sampled at temperature 1 from the model in memory.

    Each begins with the model's token for the beginning; without one with a token by chance.

    Args:
        path: checkpoint.
        count: tokens.
        window: tokens of each window.
        dtype: that the model runs in.
        seed: of sampling.
        loading: of ``from_pretrained``.
    Raises:
        UnsupportedArchitectureError, CheckpointError: transformers can't load the model.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **loading)
    except ValueError as err:
        raise UnsupportedArchitectureError(f"{path}: transformers can't load it: {in_words(err)}; give --text") from err
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as err:
        raise CheckpointError(f"{path}: transformers can't load it: {in_words(err)}; give --text") from err
    model.eval()
    config = model.config.get_text_config()
    # No end: what follows a text is another one.
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=window, eos_token_id=None, pad_token_id=0
    )
    windows: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, -(-count // window), TOGETHER):
            number = min(TOGETHER, -(-count // window) - start)
            first = torch.randint(config.vocab_size, (number, 1), generator=generator)
            bos = config.bos_token_id
            if bos is not None:
                first = torch.full_like(first, bos[0] if isinstance(bos, list) else bos)
            windows.append(model.generate(first, attention_mask=torch.ones_like(first), generation_config=sampling))
    return torch.cat(windows)
