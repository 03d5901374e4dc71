"""Models of Hugging Face: an example call, and language models with their KV cache in buffers.

A cache object of transformers cannot cross the border of an exported program. Here the cache is a
pair of buffers per layer, written in place at given positions; one graph then serves the prompt
and every token after it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fpcompiler.errors import CaptureError, OptionError

_CHECKED_TOKENS: Final = 2
"""How many single tokens a new decoder is tried on, after a prompt."""

_CHECKED_PROMPT: Final = 4
"""Length of that prompt; it is as long as the window of sliding attention if that is longer."""

_STRIDE: Final = 997
"""From one token of the comparison with the uncached model to the next."""

_TOLERANCE: Final = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits relative to the largest; 1e-3 for other dtypes. The cached and the
uncached computation sum in different orders."""


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars of transformers meanwhile: a command has its own, or shows none."""
    try:
        logging: Any = importlib.import_module("transformers.utils.logging")
    except ImportError:  # Whoever needs it says so.
        yield
        return
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def example_call(model: nn.Module) -> dict[str, Tensor]:
    """Return the arguments of a small call: token numbers, or random pixels.

    Args:
        model: A model of transformers.

    Raises:
        OptionError: If it takes something else, for which no example can be made up.
    """
    config, name = _config(model), str(model.main_input_name)
    if name == "input_ids":
        tokens = torch.arange(32).reshape(2, 16) % config.get_text_config().vocab_size
        decoder = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
        return {"input_ids": tokens, **decoder}
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (2, config.num_channels, config.image_size, config.image_size)
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(shape, generator=generator)}
    raise OptionError(
        f"{type(model).__name__} takes {name!r}, for which no example can be made up: "
        "give one with --inputs."
    )


class CachedDecoder(nn.Module):
    """A decoder-only language model that remembers the keys and values of earlier calls.

    ``forward(input_ids, position)`` takes tokens [max_batch, length] and their positions [length]
    (int64, the same for every row of the batch) and returns logits [max_batch, length, vocabulary],
    or those of the last tokens only.
    Call it with the prompt and ``arange(length)``, then with one token at a time and its position.
    Positions may be written again; what a token sees are the positions up to its own, within the
    window of layers with sliding attention. Padding is not supported.

    Works for models whose layers keep one key and one value tensor and take masks of shape
    [batch, 1, length, keys]: Llama, Mistral, Qwen3, Mixtral, Gemma, Gemma 2, GPT-2, OPT and others
    made alike. Each new decoder is compared with the model on a few tokens, so that a model that
    works in another way is refused.

    Attributes:
        model: The language model; it is shared, not copied.
        max_seq: Number of positions that the cache holds.
        last_logits: How many tokens at the end of a call get logits; 0: all.
    """

    def __init__(
        self, model: nn.Module, max_batch: int = 1, max_seq: int = 256, last_logits: int = 0
    ) -> None:
        """Allocate the cache in the dtype of the model's keys and values.

        Args:
            model: A causal language model of transformers, in eval mode.
            max_batch: Rows of every call.
            max_seq: Positions that the cache holds.
            last_logits: How many tokens at the end of a call get logits; 0: all. To generate text
                1 is enough, and a long prompt then costs no products with the whole vocabulary.

        Raises:
            CaptureError: If the model's cache or attention works in a way that is not supported.
            OptionError: If a size is less than 1, or the model has fewer positions.
        """
        super().__init__()
        _check_supported(model)
        _check_sizes(model, max_batch, max_seq)
        _check_last_logits(model, last_logits)
        self.model = model
        self.max_seq = max_seq
        self.last_logits = last_logits
        shapes = _probe(model)
        for layer, (key, value) in enumerate(shapes):
            for kind, example in (("key", key), ("value", value)):
                _, heads, _, width = example.shape
                cache = example.new_zeros(max_batch, heads, max_seq, width)
                self.register_buffer(f"{kind}_cache_{layer}", cache, persistent=False)
        self.eval()
        self._check_against_model(max_batch)

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Return the logits of tokens [max_batch, length] at positions [length]."""
        batch = next(self.buffers(recurse=False)).shape[0]
        torch._check(  # type: ignore[no-untyped-call]
            input_ids.shape[0] == batch,
            lambda: f"input_ids has {input_ids.shape[0]} texts, and the cache is for {batch}.",
        )
        masks = _masks(self.model, position, self.max_seq)
        cache = _BufferCache(self, position)
        return _logits(self.model, input_ids, position, masks, cache, self.last_logits)

    def reset(self) -> None:
        """Forget all earlier calls; a new text that begins at position 0 does not need it."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def _check_against_model(self, batch: int) -> None:
        """Compare a prompt and single tokens with the model without cache."""
        window = getattr(_config(self.model), "sliding_window", None) or 0
        prompt = max(window, _CHECKED_PROMPT) if window < self.max_seq else _CHECKED_PROMPT
        count = min(prompt + _CHECKED_TOKENS, self.max_seq)
        device = next(self.model.parameters()).device
        positions = torch.arange(count, device=device)
        # Tokens from all of the vocabulary: the first ones are special, and in bf16 the logits of
        # a text of those can differ by half of the largest from one order of sums to another.
        vocabulary = int(_config(self.model).vocab_size)
        tokens = (positions * _STRIDE + 1).remainder(vocabulary).expand(batch, count)
        calls = [slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, count))]
        with _refusing(self.model), torch.no_grad():
            expected = self.model(input_ids=tokens, use_cache=False).logits
            got = torch.cat([self(tokens[:, call], positions[call]) for call in calls], 1)
            # Of each call, the logits that it gives.
            ends = [expected[:, call][:, -self.last_logits :] for call in calls]
            expected = torch.cat(ends, 1)
        self.reset()
        error = (got - expected).abs().max()
        if not error <= _TOLERANCE.get(expected.dtype, 1e-3) * expected.abs().max():
            difference = f"with a cache its logits differ from those without by {float(error):.3g}"
            raise _refusal(self.model, difference)


class _BufferCache:
    """What transformers calls a cache, for the length of one call, over a decoder's buffers.

    Not a subclass of ``transformers.Cache``: the models only call these methods, and this module
    must import without transformers.
    """

    is_compileable = False

    def __init__(self, owner: nn.Module, position: Tensor) -> None:
        self._owner, self._position = owner, position

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [batch, heads, length, width]; return all of them."""
        keys = self._owner.get_buffer(f"key_cache_{layer_idx}")
        values = self._owner.get_buffer(f"value_cache_{layer_idx}")
        keys.index_copy_(2, self._position, key)
        values.index_copy_(2, self._position, value)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions and masks are given, so no model needs to count."""
        return 0


class _ProbeCache:
    """A cache that keeps nothing but one example of what each layer writes."""

    is_compileable = False

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the shapes; return what was given."""
        self.seen[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: nothing is kept."""
        return 0


def _check_supported(model: nn.Module) -> None:
    if model.training:
        raise CaptureError("CachedDecoder: the model is in training mode.\nFix: call model.eval().")
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "use_cache"):
        raise CaptureError(
            f"CachedDecoder: {type(model).__name__} is no language model of transformers (it has "
            "no config with use_cache).\nFix: for a model of your own keep the cache in buffers."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(model, "it has an encoder, whose keys and values need a cache of their own")
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in ("sdpa", "eager"):
        raise _refusal(
            model, f"its attention is {attention!r}; load it with attn_implementation='sdpa'"
        )
    unknown = set(_layer_types(model)) - {"full_attention", "sliding_attention"}
    if unknown:
        raise _refusal(model, f"it has layers of the types {', '.join(sorted(unknown))}")


def _check_sizes(model: nn.Module, max_batch: int, max_seq: int) -> None:
    if max_batch < 1 or max_seq < 1:
        raise OptionError(
            f"CachedDecoder needs sizes of at least 1, got {max_batch} and {max_seq}."
        )
    most = getattr(_config(model), "max_position_embeddings", None)
    if most is not None and max_seq > most:
        raise OptionError(
            f"CachedDecoder: max_seq={max_seq}, but the model was made for {most} positions."
        )


def _check_last_logits(model: nn.Module, last_logits: int) -> None:
    if last_logits < 0:
        raise OptionError(f"CachedDecoder: last_logits must be at least 0, got {last_logits}.")
    if last_logits and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "its forward has no logits_to_keep, which last_logits needs")


def _refusal(model: nn.Module, reason: str) -> CaptureError:
    return CaptureError(
        f"CachedDecoder does not support {type(model).__name__}: {reason}.\n"
        "Fix: compile the model without a cache; capture passes use_cache=False by itself."
    )


@contextlib.contextmanager
def _refusing(model: nn.Module) -> Iterator[None]:
    """Turn errors of the model's own code, which gets a cache it may not know, into a refusal."""
    try:
        yield
    except Exception as error:
        reason = f"it failed on a few tokens ({type(error).__name__}: {error})"
        raise _refusal(model, reason) from error


def _config(model: nn.Module) -> Any:
    return model.config


def _layer_types(model: nn.Module) -> list[str]:
    return list(getattr(_config(model), "layer_types", None) or [])


def _probe(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the key and value that each layer writes for one token.

    That is the truth about head counts and widths, which every architecture writes into its config
    in another way.
    """
    position = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
    cache = _ProbeCache()
    with _refusing(model), torch.no_grad():
        _logits(model, position[None], position, _masks(model, position, 1), cache)
    layers = sorted(cache.seen)
    ranks = [tensor.ndim for pair in cache.seen.values() for tensor in pair]
    if not layers or layers != list(range(len(layers))) or {*ranks} != {4}:
        raise _refusal(model, "its layers do not each keep one 4-D key and value tensor")
    return [cache.seen[layer] for layer in layers]


def _logits(
    model: nn.Module, input_ids: Tensor, position: Tensor, masks: Any, cache: Any, last: int = 0
) -> Tensor:
    options = {"logits_to_keep": last} if last else {}
    logits: Tensor = model(
        input_ids=input_ids,
        attention_mask=masks,
        position_ids=position[None],
        past_key_values=cache,
        use_cache=True,
        **options,
    ).logits
    return logits


def _masks(model: nn.Module, position: Tensor, length: int) -> Tensor | Mapping[str, Tensor]:
    """Return the mask [1, 1, queries, length], or one for each type of layers.

    True means "attend" for ``sdpa``; ``eager`` attention adds the mask to the scores instead.
    """
    key = torch.arange(length, device=position.device)
    causal = key[None, :] <= position[:, None]
    window = getattr(_config(model), "sliding_window", None)
    sliding = causal if window is None else causal & (key[None, :] > position[:, None] - window)
    types = _layer_types(model)
    if not types:
        return _mask(model, causal if window is None else sliding)
    masks = {"full_attention": causal, "sliding_attention": sliding}
    return {name: _mask(model, mask) for name, mask in masks.items()}


def _mask(model: nn.Module, allowed: Tensor) -> Tensor:
    allowed = allowed[None, None]
    if _config(model)._attn_implementation == "sdpa":
        return allowed
    dtype = next(model.parameters()).dtype
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)
