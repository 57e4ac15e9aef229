"""Option scoring: how likely does a language model find each option as the answer to a prompt?

The ids are those that LLaMA-Factory trains on (letterhead.models.prompt). One forward pass a row
scores all options, whatever they are spelled like, and computes nothing that nobody reads:

- the tokens that all prompts begin with are run once, and every batch attends to their keys and
  values;
- the options hang on the prompt's last token as a tree: a beginning that several names share is run
  once, and a mask lets each branch see the prompt and its own tokens only. Letters part at once, so
  their tree is empty;
- the vocabulary projection is computed at the positions that predict an option's token, and nowhere
  else;
- rows are sorted by length and batched to a budget of tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from letterhead.models.checkpoints import base_of, require_model
from letterhead.models.cpu import attention, pack, use_onednn
from letterhead.models.precision import cast, precision, with_shared_weights
from letterhead.models.prompt import Answer
from letterhead.runs.processes import Workers
from letterhead.runs.terminal import progress

# Logits held at once: rows × positions × vocabulary; 2**26 float32 are 256 MiB.
MAX_LOGITS = 1 << 26
# On a GPU so few tokens are a matter of launching kernels (an estimate for 28 layers; never
# measured).
FEW_TOKENS = 1024


@dataclass
class OptionScores:
    """What `score_options` returns.

    log_likelihood : (rows, options), the natural logarithm of each option's probability given the
        prompt, summed over the tokens that spell it
    token_count : (options,), how many tokens that sum runs over
    tokens : how many tokens went through the model, padding included
    """

    log_likelihood: np.ndarray
    token_count: np.ndarray
    tokens: int

    @property
    def perplexity(self) -> np.ndarray:
        """exp of the mean negative log-likelihood a token, shape (rows, options)."""
        return np.exp(-self.log_likelihood / self.token_count)

    def score(self, how: str) -> np.ndarray:
        """`mean`: minus the logarithm of the perplexity; `sum`: the log-likelihood. The best option
        has the highest."""
        return self.log_likelihood / self.token_count if how == "mean" else self.log_likelihood

    def probabilities(self, how: str) -> np.ndarray:
        """Softmax of the scores over the options, shape (rows, options)."""
        return softmax(self.score(how))


def softmax(score: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    odds = np.exp(score - score.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


class OptionTree:
    """The options' tokens, shared beginnings merged.

    Parameters
    ----------
    answers : the options as trained
    with_end : count the token that ends the turn, so that no option is the beginning of another

    Attributes
    ----------
    shared : the answer tokens that all options begin with; they follow every prompt
    tokens, parents : the tree's nodes, those that have a child; parents[i] < i, or -1 for the
        prompt's last token
    kept : how many of a sequence's last positions predict a token of some option
    """

    def __init__(self, answers: Sequence[Answer], with_end: bool):
        spelled = [answer.ids[: answer.stop + with_end] for answer in answers]
        n = _common_prefix(spelled)
        start = min([n, *(answer.start for answer in answers)])
        lead = n - start
        self.shared = spelled[0][:n]
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._predictions: dict[
            tuple[int, int], int
        ] = {}  # (kept position, predicted token) → column
        self._columns = [
            [self._column(i, self.shared[start + i]) for i in range(lead)] for _ in answers
        ]
        nodes: dict[tuple[int, int], int] = {}
        for columns, ids in zip(self._columns, spelled, strict=True):
            node = -1
            for i, token in enumerate(ids[n:], n):
                columns.append(self._column(lead + 1 + node, token))
                if i + 1 < len(ids):
                    if (node, token) not in nodes:
                        nodes[node, token] = len(self.tokens)
                        self.tokens.append(token)
                        self.parents.append(node)
                    node = nodes[node, token]
        self.kept = lead + 1 + len(self.tokens)
        self.token_count = np.array([len(columns) for columns in self._columns])

    def _column(self, position: int, token: int) -> int:
        return self._predictions.setdefault((position, token), len(self._predictions))

    @property
    def depths(self) -> list[int]:
        """How far each node lies behind the prompt's last token, from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def visibility(self) -> torch.Tensor:
        """Which node may attend to which: itself and its ancestors; bool, shape (nodes, nodes)."""
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees

    def log_likelihood(self, logits: torch.Tensor) -> torch.Tensor:
        """Sum the options' tokens: logits of shape (rows, kept, vocabulary) → (rows, options),
        float64."""
        position, token = (
            torch.tensor(part, device=logits.device)
            for part in zip(*self._predictions, strict=True)
        )
        predicted = (logits[:, position, token] - logits.logsumexp(-1)[:, position]).double()
        return torch.stack([predicted[:, columns].sum(-1) for columns in self._columns], dim=1)


def load_decoder(
    folder: Path, dtype: str, packed: bool = True, keeps_base: bool = False
) -> PreTrainedModel:
    """Load a decoder for scoring, merged with its adapter where the folder holds one: safetensors
    only, on the GPU if there is one; on a CPU with packed linear layers.

    `dtype` is float32, bfloat16 or auto (see `precision`); the last projection is float32 in each.
    With `keeps_base` the base of an adapter stays in memory for the next one (`forget_base`).

    Raises
    ------
    LetterheadError : no checkpoint there, or one that is cut off
    """
    require_model(folder)
    use_onednn()
    base = base_of(folder)
    load = _load_base if keeps_base else _load
    model = _load(folder) if base == folder else _merged(load(base), folder)
    model = (
        cast(model, precision(dtype, base))
        .to("cuda" if torch.cuda.is_available() else "cpu")
        .eval()
    )
    return pack(model) if packed else model


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention(),
        use_safetensors=True,
        trust_remote_code=False,
    )


@lru_cache(maxsize=1)
def _load_base(folder: Path) -> PreTrainedModel:
    """The base of adapters, which is read once for all checkpoints of a training."""
    return _load(folder)


def forget_base() -> None:
    """Give back the memory of the base that adapters were added to."""
    _load_base.cache_clear()


def _merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from letterhead.models.adapters import load_merged

    return load_merged(with_shared_weights(base), folder)


def load_merged_decoder(folder: Path) -> PreTrainedModel:
    """The whole decoder that a folder's adapter makes, in float32 and in the machine's memory, not
    a GPU's.

    Raises
    ------
    LetterheadError : as `load_decoder`
    """
    require_model(folder)
    return _merged(_load(base_of(folder)), folder)


@torch.inference_mode()
def score_options(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    answers: Sequence[Answer],
    with_end: bool,
    batch_tokens: int,
    title: str | None = None,
) -> OptionScores:
    """Score every option after every prompt.

    Parameters
    ----------
    model : a causal language model
    prompts : token ids, through the last token before the answer
    answers : the options (letterhead.models.prompt.PromptEncoder.answers)
    with_end : count the end token too; for names, not for letters
    batch_tokens : how many tokens a forward pass may hold, padding included
    title : of a progress bar in rows/s, or None for none

    Returns
    -------
    OptionScores, rows in the order of `prompts`; the batching does not show in them beyond rounding
    """
    tree = OptionTree(answers, with_end)
    rows = [[*prompt, *tree.shared] for prompt in prompts]
    kept_of_row = tree.kept - len(tree.tokens)
    n_prefix = 0
    if _two_passes_pay(model.device.type, [len(row) for row in rows]):
        n_prefix = min(_common_prefix(rows), min(map(len, rows)) - kept_of_row)
    prefix = _run_prefix(model, rows[0][:n_prefix])
    result = torch.zeros(len(rows), len(answers), dtype=torch.float64)
    tokens = n_prefix
    with progress(
        total=len(rows), desc=title, unit=" rows", disable=title is None, mininterval=0.5
    ) as bar:
        for batch in _batches(
            [len(row) - n_prefix for row in rows], tree, batch_tokens, model.config.vocab_size
        ):
            inputs = _inputs(
                [rows[i][n_prefix:] for i in batch], tree, n_prefix, model.dtype, model.device
            )
            logits = model(
                **inputs,
                past_key_values=_expand(prefix, len(batch)),
                use_cache=True,
                logits_to_keep=tree.kept,
            ).logits
            result[batch] = tree.log_likelihood(logits).cpu()
            tokens += inputs["input_ids"].numel()
            bar.update(len(batch))
    return OptionScores(result.numpy(), tree.token_count, tokens)


def score_in_parts(
    workers: Workers,
    prompts: Sequence[list[int]],
    answers: Sequence[Answer],
    with_end: bool,
    batch_tokens: int,
    title: str | None = None,
) -> tuple[OptionScores, float]:
    """`score_options` by workers that have loaded a decoder, each on its part of the rows.

    Returns
    -------
    tuple : the scores, rows in the order of `prompts`; the seconds that the slowest part took,
        loading left out
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    parts = [order[rank :: workers.n] for rank in range(workers.n)]
    parts_given = [
        (
            [prompts[row] for row in part],
            answers,
            with_end,
            batch_tokens,
            title if rank == 0 else None,
        )
        for rank, part in enumerate(parts)
        if part
    ]
    scored = workers.map(_timed_scores, parts_given)
    likelihood = np.zeros((len(prompts), len(answers)))
    for part, (scores, _) in zip(parts, scored, strict=False):
        likelihood[part] = scores.log_likelihood
    tokens = sum(scores.tokens for scores, _ in scored)
    return OptionScores(likelihood, scored[0][0].token_count, tokens), max(
        seconds for _, seconds in scored
    )


def _timed_scores(model: PreTrainedModel, *arguments) -> tuple[OptionScores, float]:
    start = time.perf_counter()
    return score_options(model, *arguments), time.perf_counter() - start


def _two_passes_pay(device: str, lengths: list[int]) -> bool:
    """Whether the tokens that all rows begin with are worth a pass of their own.

    One row shares them with none; and on a GPU a pass of few tokens takes as long as its kernels
    take to be launched.
    """
    return len(lengths) > 1 and (device == "cpu" or sum(lengths) > FEW_TOKENS)


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # all others lie between these two
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )


def _run_prefix(model: PreTrainedModel, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the tokens that all rows begin with, one pair a layer."""
    if not ids:
        return []
    cache = DynamicCache()
    model(
        input_ids=torch.tensor([ids], device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _expand(prefix: list[tuple[torch.Tensor, torch.Tensor]], rows: int) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


def _batches(
    lengths: list[int], tree: OptionTree, batch_tokens: int, vocabulary: int
) -> list[list[int]]:
    """Row numbers, longest first (what does not fit in memory fails at once), cut into batches of
    the budget."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = []
    while order:
        width = lengths[order[0]] + len(tree.tokens)
        n = max(1, min(batch_tokens // width, MAX_LOGITS // (tree.kept * vocabulary)))
        batches.append(order[:n])
        order = order[n:]
    return batches


def _inputs(
    rows: list[list[int]], tree: OptionTree, n_prefix: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Token ids, positions and mask of a batch.

    Rows are padded on the left, so that the positions that predict stand in the same columns for
    all; behind them stand the tree's nodes. A query sees the prefix, what precedes it in its row,
    and, in the tree, its ancestors; a padding sees itself, since a softmax over nothing is not a
    number. The mask is one to be added: eager attention adds what it is given.
    """
    length, nodes = max(len(row) for row in rows), len(tree.tokens)
    ids = torch.zeros(len(rows), length + nodes, dtype=torch.long)
    positions = torch.zeros_like(ids)
    real = torch.zeros(len(rows), length + nodes, dtype=torch.bool)
    real[:, length:] = True
    for i, row in enumerate(rows):
        begin = length - len(row)
        ids[i, begin:] = torch.tensor(row + tree.tokens)
        positions[i, begin:length] = torch.arange(n_prefix, n_prefix + len(row))
        positions[i, length:] = torch.tensor(tree.depths) + (n_prefix + len(row) - 1)
        real[i, begin:length] = True
    sees = torch.ones(length + nodes, length + nodes, dtype=torch.bool).tril()
    sees[length:, length:] = tree.visibility()
    mask = (sees & real[:, None, :]) | torch.eye(length + nodes, dtype=torch.bool)
    mask = torch.cat(
        [torch.ones(len(rows), length + nodes, n_prefix, dtype=torch.bool), mask], dim=-1
    )
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": added[:, None]}
    return {name: tensor.to(device) for name, tensor in batch.items()}
