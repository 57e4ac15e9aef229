"""Scores equal a plain forward pass over each option, whatever the batch, and those of
lm-evaluation-harness."""

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.peers import shape
from bench.peers.scoring import peer_ids_are_trained, peer_pair
from letterhead.config.evaluation import Prompt
from letterhead.files import LetterheadError
from letterhead.models.checkpoints import model_facts, require_model
from letterhead.models.prompt import PromptEncoder
from letterhead.models.scoring import OptionTree, load_decoder, score_in_parts, score_options
from letterhead.runs.processes import Workers
from prep import data
from tests.test_data import write_csv

TEXTS = [
    "Oil prices rose again on Monday.",
    "今天的股市大涨,科技公司领涨。",
    "The home side won 3-2 after extra time, its first cup in 40 years, said the coach. " * 8,
    "A new chip",
    "Line\n\nbreaks and <|im_end|> and 🏆",
]
NAMES = ["World", "Sports", "Sci/Tech", "Science", "money-fx", "money-supply", "nat gas", "nat"]


def encoder_of(folder, options: str, labels: list[str], **keys) -> PromptEncoder:
    from llamafactory.hparams import DataArguments

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return PromptEncoder(
        tokenizer,
        DataArguments(template="qwen3", cutoff_len=512, **keys),
        Prompt(options=options),
        labels,
    )


@torch.inference_mode()
def plain_log_likelihood(model, prompts, answers, with_end) -> np.ndarray:
    """One forward pass an option, nothing shared, nothing padded."""
    result = np.zeros((len(prompts), len(answers)))
    for i, prompt in enumerate(prompts):
        for k, answer in enumerate(answers):
            ids = prompt + answer.ids
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            at = range(len(prompt) + answer.start, len(prompt) + answer.stop + with_end)
            result[i, k] = sum(logs[j - 1, ids[j]].item() for j in at)
    return result


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("options", ["letters", "names"])
@pytest.mark.parametrize("decoder", ["smollm2", "qwen3"])
def test_scores_equal_a_plain_forward_pass_in_any_batch(tiny_models, decoder, options, thinking):
    model = load_decoder(tiny_models[decoder], "float32")
    encoder = encoder_of(tiny_models[decoder], options, NAMES, enable_thinking=thinking)
    prompts = [encoder.encode(text) for text in TEXTS]
    with_end = options == "names"
    expected = plain_log_likelihood(model, prompts, encoder.answers, with_end)
    for batch_tokens in (1, 700, 100_000):
        scores = score_options(model, prompts, encoder.answers, with_end, batch_tokens)
        assert np.abs(scores.log_likelihood - expected).max() < 1e-4
    alone = score_options(model, prompts[2:3], encoder.answers, with_end, 2048)
    assert np.abs(alone.log_likelihood - expected[2:3]).max() < 1e-4
    assert (scores.token_count == [a.stop - a.start + with_end for a in encoder.answers]).all()
    assert np.allclose(scores.perplexity, np.exp(-expected / scores.token_count), rtol=1e-3)
    assert (scores.probabilities("mean").argmax(1) == scores.perplexity.argmin(1)).all()
    assert (scores.probabilities("sum").argmax(1) == expected.argmax(1)).all()
    assert np.allclose(scores.probabilities("sum").sum(1), 1)


def test_prompts_that_share_nothing_are_scored_too(tiny_models):
    model = load_decoder(tiny_models["smollm2"], "float32")
    encoder = encoder_of(tiny_models["smollm2"], "letters", NAMES[:3])
    prompts = [[5, 6, 7, 8], [9], [10, 11, 12]]
    scores = score_options(model, prompts, encoder.answers, False, 2048)
    assert (
        np.abs(
            scores.log_likelihood - plain_log_likelihood(model, prompts, encoder.answers, False)
        ).max()
        < 1e-4
    )


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_in_bfloat16_the_last_projection_is_float32_and_close_options_do_not_tie(tiny_models, name):
    encoder, folder = (
        encoder_of(tiny_models[name], "letters", [str(i) for i in range(26)]),
        tiny_models[name],
    )
    prompts = [encoder.encode(f"{text} {i}") for i in range(8) for text in TEXTS]
    exact = load_decoder(folder, "float32")
    half = load_decoder(folder, "bfloat16")
    assert (
        half.dtype == torch.bfloat16 and half.get_output_embeddings().weight.dtype == torch.float32
    )
    assert model_facts(half)["parameters"] == model_facts(exact)["parameters"]
    assert torch.equal(half.get_output_embeddings().weight, exact.get_output_embeddings().weight)
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}  # rotary frequencies
    mine = score_options(half, prompts, encoder.answers, False, 1024).log_likelihood
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs = score_options(plain, prompts, encoder.answers, False, 1024).log_likelihood

    def ties(scores: np.ndarray) -> int:
        return sum(len(set(row)) < len(row) for row in scores.tolist())

    assert ties(theirs) > len(prompts) // 2 and ties(mine) == 0


@pytest.mark.parametrize("n", [2, 3])
def test_rows_spread_over_processes_score_as_in_one(tiny_models, n):
    encoder, folder = encoder_of(tiny_models["qwen3"], "names", NAMES), tiny_models["qwen3"]
    prompts = [encoder.encode(text) for text in TEXTS]
    alone = score_options(load_decoder(folder, "float32"), prompts, encoder.answers, True, 512)
    with Workers(n, load_decoder, folder, "float32") as workers:
        spread, seconds = score_in_parts(workers, prompts, encoder.answers, True, 512)
        one, _ = score_in_parts(
            workers, prompts[:1], encoder.answers, True, 512
        )  # fewer rows than processes
    assert np.abs(spread.log_likelihood - alone.log_likelihood).max() < 1e-4 and seconds > 0
    assert np.abs(one.log_likelihood - alone.log_likelihood[:1]).max() < 1e-4
    assert spread.token_count.tolist() == alone.token_count.tolist()


def test_names_with_a_common_beginning_share_its_tokens(tiny_models):
    encoder = encoder_of(
        tiny_models["smollm2"], "names", ["money-fx", "money-supply", "nat", "nat gas"]
    )
    tree = OptionTree(encoder.answers, with_end=True)
    assert len(tree.tokens) < sum(tree.token_count) - len(
        tree.token_count
    )  # fewer than run one by one
    assert (
        OptionTree(
            encoder_of(tiny_models["smollm2"], "letters", NAMES).answers, with_end=False
        ).tokens
        == []
    )


def test_a_letter_takes_one_position_and_no_more_logits_than_that(tiny_models):
    for decoder in ("smollm2", "qwen3"):
        assert (
            OptionTree(
                encoder_of(tiny_models[decoder], "letters", NAMES).answers, with_end=False
            ).kept
            == 1
        )


@pytest.mark.parametrize("options", ["letters", "names"])
def test_a_real_model_agrees_with_lm_evaluation_harness(fetched, options):
    model = load_decoder(fetched["smollm2"], "float32")
    encoder = encoder_of(fetched["smollm2"], options, NAMES[:4])
    prompts, with_end = [encoder.encode(text) for text in TEXTS[:4]], options == "names"
    ours = score_options(model, prompts, encoder.answers, with_end, 2048).log_likelihood
    peer = HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=4, max_length=512)
    pairs = [
        peer_pair(encoder, ids, answer, with_end) for ids in prompts for answer in encoder.answers
    ]
    assert all(
        peer_ids_are_trained(peer, encoder, ids, answer, with_end)
        for ids in prompts
        for answer in encoder.answers
    )
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = np.array(
        [value for value, _ in peer.loglikelihood(requests, disable_tqdm=True)]
    ).reshape(ours.shape)
    assert np.abs((ours - ours[:, :1]) - (theirs - theirs[:, :1])).max() < 1e-3
    assert (ours.argmax(1) == theirs.argmax(1)).all()


def test_a_missing_or_cut_off_checkpoint_is_named(tiny_models, tmp_path):
    import shutil

    with pytest.raises(LetterheadError, match=r"no checkpoint there \(no config.json\)"):
        load_decoder(tmp_path / "none", "float32")
    shutil.copytree(tiny_models["smollm2"], tmp_path / "half")
    weights = tmp_path / "half/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(
        LetterheadError,
        match=r"half/model.safetensors: cut off: it has \d+ bytes, its header says \d+",
    ):
        require_model(tmp_path / "half")
    weights.write_bytes(b"\xff" * 8)
    with pytest.raises(LetterheadError, match="its header"):
        require_model(tmp_path / "half")


def test_scoring_of_a_shape_is_measured_against_the_harness(make_experiment):
    """The tiny decoder in the place of the article's: `make bench-shape` asks no more of it than
    that it can be loaded."""
    write_csv(
        "rows.csv",
        [
            (f"text {i} of {'wars' if i % 2 else 'goals'}", ["World", "Sports"][i % 2])
            for i in range(60)
        ],
    )
    keys = {"scoring_rows": 6, "scoring_runs": 3}
    experiment = make_experiment(
        "rows.csv", ["World", "Sports"], data={"rows": {"validation": 2, "test": 20}}, bench=keys
    )
    data.main(experiment)
    found = shape.scoring(experiment)
    assert found["rows"] == 6 and found["same_predictions"] == 1 and found["max_difference"] < 1e-4
    assert len(found["ratios"]) == 3 and found["dtype"] == "torch.float32"
