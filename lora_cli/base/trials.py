"""Trials: what has to be true of a model before it is trained this way, tried on the model that was loaded.

Causality and packed rows (does a token see only what it may?), replaced modules (same gradient, same output?),
and logits (what is done to the output of the head?). No list of architectures is asked. A leak is
distinguished from rounding by what the same model does where it may look: in fp32 sums are equal to about 1e-5, in 16
bits a router of experts may choose another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.base.attention import packed_inputs
from lora_cli.base.linear import features
from lora_cli.base.surgery import Forward
from lora_cli.base.text import positions, text_config, vocabulary
from lora_cli.errors import LoraError

_FP32 = 1e-3  # deviations of the logits, between one kernel and another; rounding makes 1e-6 to 1e-5 of them
_ROUNDING_SHARE = 0.25  # of what a leak changes, that 16-bit rounding may change between one kernel and another
# Between two runs of the same kernels on the same shapes most is bit for bit. Where it is not, because the whole batch
# decides over the rounding of a token (by experts), a share of what a leak changes.
_SAME_FP32 = 1e-4
_SAME_SHARE, _SAME_SHARE_BY_BATCH = 1e-3, 0.05
_CAUSAL_TOKENS = 24
_LENGTHS = (7, 40, 5)  # of examples on one row, in tokens, of a model that sees so many; one is not tiny


@torch.no_grad()
def require_computes(model: Any) -> None:
    """Raises LoraError if the model's own code fails on a short row of text, as it may with a wrong configuration."""
    _logits(model, ordinary_tokens(model, 2, 0).to(model.device), type(model).__name__)


def require_causal(model: Any, device: torch.device, *, name: str | None = None) -> None:
    """Raises LoraError if a token's prediction sees tokens after it, or logits are NaN. name: of the model, in errors.

    Such a model would be trained to repeat what it sees; encoders such as BERT are among transformers' causal models.
    """
    name = name or type(model).__name__
    with in_mode(model, training=False):
        earlier, last, deviation = _seen_from_before(model, device, name)
    most = earlier.max().item()
    everywhere = not _batch_decides(model) and (earlier > 0).float().mean() > 0.5
    if most > _limit(model, last, deviation) or everywhere:
        moved = f"when the last token of a row changes, logits before it move by {most / deviation:.2g} deviations"
        hint = ""
        if getattr(text_config(model.config), "is_decoder", None) is False:
            hint = "; if this checkpoint was trained to predict the next token, write is_decoder: true in config.json"
        raise LoraError(
            f"{name} is not causal: it sees the tokens that it is to predict",
            details=[moved],
            fix=f"choose a decoder-only model, such as Llama, Qwen, Gemma or GPT-2{hint}",
        )


def require_no_leak(model: Any, device: torch.device, *, name: str | None = None) -> None:
    """Raises LoraError if this architecture cannot keep packed examples apart, or cannot compute packed rows at all."""
    name = name or type(model).__name__
    with in_mode(model, training=False):
        difference, leaking = packing_difference(model, device, name)
        moved, most = (0.0, 0.0) if model.dtype == torch.float32 else _seen_from_beside(model, device, name)
    limit = _FP32 if model.dtype == torch.float32 else _ROUNDING_SHARE * leaking
    reason = f"packed, logits differ by {difference:.2g} standard deviations; with a leak by {leaking:.2g}"
    if difference < limit and moved > _limit(model, most, 0.0):
        reason = f"another first example moves the logits of the next ones by {moved / most:.2%} of what a leak does"
        limit = 0.0
    if not difference < limit:
        raise LoraError(
            f"{name} does not keep packed examples apart", details=[reason], fix="write data.packing: false"
        )


@torch.no_grad()
def packing_difference(model: Any, device: torch.device, name: str = "the model") -> tuple[float, float]:
    """Largest difference of a logit from each example alone: (packed, leaking), in deviations of the logits.

    leaking is the yardstick: the same row read as one example, where the second sees the first and its positions do
    not start at zero. Packed as it should be, only rounding is left: about 1e-6 in fp32, 1e-2 in bf16.
    """
    examples = _examples(model, device)
    alone = torch.cat([_logits(model, example, name) for example in examples])
    packed, leaking = _packed(model, examples, name), _logits(model, torch.cat(examples), name)

    def difference(logits: Tensor) -> float:
        return ((logits - alone).abs().max() / alone.std()).item()

    return difference(packed), difference(leaking)


@torch.no_grad()
def _seen_from_before(model: Any, device: torch.device, name: str) -> tuple[Tensor, float, float]:
    """As the last of some tokens changes: (changes of the logits before it, change at itself, deviation of all).

    Three changes, each in a run of its own. A token that rounding sends to other experts moves in one of them, one that
    sees the last token in all: for each the smallest change counts.
    """
    row = ordinary_tokens(model, min(_CAUSAL_TOKENS, positions(model.config) or _CAUSAL_TOKENS), 0)
    others = [token for token in ordinary_tokens(model, 64, 1).unique() if token != row[-1]][:3]
    rows = [torch.cat([row[:-1], last[None]]).to(device) for last in (row[-1], *others)]
    own, *changed = (_logits(model, each, name) for each in rows)
    if own.isnan().any():
        raise LoraError(
            f"{name} computes NaN in {str(model.dtype).removeprefix('torch.')}",
            fix="write dtype: fp32, or bf16 on a device that has it; if that changes nothing, download the model again",
        )
    moved = torch.stack([(logits - own).abs().amax(-1) for logits in changed])  # (changes, tokens)
    return moved[:, :-1].amin(0), moved[:, -1].median().item(), own.std().item()


@torch.no_grad()
def _seen_from_beside(model: Any, device: torch.device, name: str) -> tuple[float, float]:
    """Largest change of a logit as the first example on the row changes: (packed, leaking).

    It finds what `packing_difference` cannot in 16 bits: a few recurrent layers that go on through all examples while
    attention keeps them apart.
    """
    examples = _examples(model, device)
    first = len(examples[0])
    changed = [[ordinary_tokens(model, first, seed).to(device), *examples[1:]] for seed in (2, 3)]

    def moved(compute: Any) -> float:
        own = compute(examples)[first:]
        by_token = [(compute(each)[first:] - own).abs().amax(-1) for each in changed]
        return torch.stack(by_token).amin(0).max().item()

    packed = moved(lambda each: _packed(model, each, name))
    return packed, moved(lambda each: _logits(model, torch.cat(each), name))


def _packed(model: Any, examples: list[Tensor], name: str) -> Tensor:
    """(tokens, vocabulary), fp32."""
    inputs = packed_inputs([len(example) for example in examples], examples[0].device)
    with model_errors(f"{name} cannot compute packed rows", "write data.packing: false"):
        return model(input_ids=torch.cat(examples)[None], **inputs, use_cache=False).logits[0].float()


def _logits(model: Any, ids: Tensor, name: str) -> Tensor:
    """(tokens, vocabulary) of one row, fp32."""
    with model_errors(f"{name} cannot compute a row of text"):
        return model(input_ids=ids[None], use_cache=False).logits[0].float()


def _limit(model: Any, leak: float, deviation: float) -> float:
    """The largest change of a logit that is rounding. leak: what a leak changes; deviation: of the logits."""
    if model.dtype == torch.float32:
        return _SAME_FP32 * deviation
    return leak * (_SAME_SHARE_BY_BATCH if _batch_decides(model) else _SAME_SHARE)


def _batch_decides(model: Any) -> bool:
    """Whether what is computed of a token may be rounded by what else is in the batch."""
    kinds = {type(module).__name__.lower() for module in model.modules()}
    return any(word in kind for kind in kinds for word in ("expert", "moe", "router"))


def _examples(model: Any, device: torch.device) -> list[Tensor]:
    seen = positions(model.config) or sum(_LENGTHS)
    lengths = [max(2, length * min(seen, sum(_LENGTHS)) // sum(_LENGTHS)) for length in _LENGTHS]
    return list(ordinary_tokens(model, sum(lengths), 0).to(device).split(lengths))


def ordinary_tokens(model: Any, count: int, seed: int) -> Tensor:
    """(count,) of random ordinary tokens: not those that stand for pictures, or for padding."""
    marks: set[Any] = set()
    for config in (model.config, text_config(model.config)):
        named = [getattr(config, key, None) for key in vars(config) if key.endswith(("_token_id", "_token_index"))]
        marks.update(mark for each in named for mark in (each if isinstance(each, list) else [each]))
    ordinary = [id for id in range(min(vocabulary(model.config), 4096)) if id not in marks]
    drawn = torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ordinary)[drawn]


# ── replaced modules, and logits ──────────────────────────────────────────────────────────────────────────────────


def same_gradient(norm: Any, forward: Forward) -> bool:
    """Whether `forward`, in place of the norm's own, gives the same output bit for bit, nearly the same gradient."""
    weight = norm.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(weight).requires_grad_()
    grad_output = torch.randn(3, weight.shape[-1], generator=generator).to(weight)
    try:
        outputs = norm(x), forward(x)
        expected, actual = (torch.autograd.grad(each, x, grad_output.to(each.dtype))[0] for each in outputs)
    except Exception:  # any architecture's own code, such as a norm that takes a gate: left as it is
        return False
    return torch.equal(*outputs) and _close(actual, expected)


def same_again(module: nn.Module, forward: Forward) -> bool:
    """Whether `forward`, in place of an elementwise module's own, gives the same output and gradient, bit for bit.

    In training mode, where a module that draws random numbers shows it.
    """
    weight = getattr(module, "weight", None)
    like = torch.empty(64) if weight is None else weight
    generator = torch.Generator().manual_seed(0)
    x, grad_output = (torch.randn(3, len(like), generator=generator).to(like) for _ in range(2))
    try:
        with in_mode(module, training=True), torch.random.fork_rng([like.device] if like.is_cuda else []):
            outputs = [call(x.requires_grad_()) for call in (module, forward)]
        expected, actual = (torch.autograd.grad(each, x, grad_output)[0] for each in outputs)
    except Exception:  # any architecture's own code: left as it is
        return False
    return torch.equal(*outputs) and torch.equal(actual, expected)


def same_function(own: Forward, ours: Forward, inputs: Sequence[Tensor]) -> bool:
    """Whether `ours` has the outputs of `own` and their gradients, but for the rounding of the inputs' dtype.

    What `ours` raises is raised; where `own` cannot be called so, it is not the same.
    """
    found: list[list[Tensor]] = []
    for call in (own, ours):
        leaves = [each.detach().clone().requires_grad_() for each in inputs]
        generator = torch.Generator().manual_seed(0)
        try:
            given = call(*(leaf.clone() for leaf in leaves))  # a kernel may overwrite what it is given
            outputs = given if isinstance(given, tuple) else (given,)
            upstream = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
            found.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
        except Exception:  # any architecture's own code: left as it is
            if call is ours:
                raise
            return False
    # In fp32 GELU and its approximation by tanh are 2e-4 apart, two kernels of one function 1e-6.
    limits = (max(2e-5, 4 * torch.finfo(each.dtype).eps) for each in found[0])
    return all(distance(actual, expected) < limit for expected, actual, limit in zip(*found, limits, strict=True))


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()


def same_output(mlp: Any, forward: Forward, first: Any) -> bool:
    """Whether `forward`, in place of the module's own, gives the same output bit for bit, in training mode too.

    first: the layer that takes the module's input.
    """
    modes = {module: module.training for module in mlp.modules()}
    try:
        for module in modes:
            if module is mlp or isinstance(module, nn.Dropout):  # adapters keep their mode
                module.training = True
        weight = next(getattr(mlp.down_proj, "base_layer", mlp.down_proj).parameters())  # A and B are fp32
        width = features(getattr(first, "base_layer", first))[0]
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            expected, actual = mlp(x), forward(x)
    except Exception:  # any architecture's own code: left as it is
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    return isinstance(expected, Tensor) and torch.equal(actual, expected)


@torch.no_grad()
def same_logits(model: Any, rule: Callable[[Tensor], Tensor]) -> bool:
    """Whether the head's output with `rule` applied is what the model returns as logits, for a few tokens."""
    seen: list[Tensor] = []
    ids = torch.arange(min(8, vocabulary(model.config)), device=model.get_input_embeddings().weight.device)
    with in_mode(model, training=False):
        stated = with_head_hook(model, lambda _, inputs: seen.append(inputs[0]), {"input_ids": ids[None]}).logits
        if len(seen) != 1:
            return False
        own = model.get_output_embeddings()(seen[0])
    return own.shape == stated.shape and _close(rule(own.float()), stated)


def with_head_hook(model: Any, before_head: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """The model's output for these inputs, with a forward pre-hook on its output head."""
    hook = model.get_output_embeddings().register_forward_pre_hook(before_head)
    try:
        return model(**inputs, use_cache=False)
    finally:
        hook.remove()


def _close(actual: Tensor, expected: Tensor) -> bool:
    rounding = 16 * torch.finfo(expected.dtype).eps
    return bool(torch.allclose(actual.float(), expected.float(), rtol=rounding, atol=rounding))


@contextmanager
def in_mode(model: Any, *, training: bool) -> Iterator[None]:
    """Within this block the model is in training or evaluation mode."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def model_errors(what: str, fix: str = "upgrade transformers, or choose another model") -> Iterator[None]:
    """Turn what an architecture's own code raises in this block into a LoraError; running out of memory aside."""
    try:
        yield
    except (LoraError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise LoraError(f"{what}: {type(error).__name__}: {said}", fix=fix) from error
