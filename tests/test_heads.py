"""A linear head: padding does not show, control strings are text, the article's parameters mean
what they say."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, set_seed

from letterhead.config.experiment import load_experiment
from letterhead.config.models import Head
from letterhead.files import LetterheadError, read_json
from letterhead.models import heads
from letterhead.models.classifier import load_raw
from letterhead.models.folding import load_folded
from letterhead.models.llamafactory import planned_steps
from letterhead.models.prompt import OptionEncoder, TextEncoder, load_prompt_encoder
from letterhead.models.scoring import load_decoder, score_options
from letterhead.plan.time import parts_of_texts
from letterhead.runs import results
from prep import data
from serve import export
from tests.test_data import write_csv
from tests.test_training import steps_of
from train import heads as train

LABELS = ["a", "b", "c"]

TEXTS = [
    "Shares fell.",
    "A longer text about the cup final, which went to penalties after extra time. " * 6,
    "你好 world",
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_a_padded_batch_gives_what_single_texts_give(tiny_models, name, side):
    set_seed(0)
    folder = tiny_models[name]
    model, tokenizer = heads.load_head(folder, list("abcd")).eval(), heads.load_tokenizer(folder)
    tokenizer.padding_side = side
    ids = TextEncoder(tokenizer, 512).encode(TEXTS)
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.inference_mode():
        together = model(**batch).logits
        alone = torch.cat([model(input_ids=torch.tensor([one])).logits for one in ids])
    assert alone.abs().max() > 0.1  # weights large enough for a wrong token to show
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_a_real_models_padded_batch_gives_what_single_texts_give(fetched, name):
    set_seed(0)
    model, tokenizer = (
        heads.load_head(fetched[name], list("abcd")).eval(),
        heads.load_tokenizer(fetched[name]),
    )
    ids = TextEncoder(tokenizer, 512).encode(TEXTS)
    with torch.inference_mode():
        together = model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits
        alone = torch.cat([model(input_ids=torch.tensor([one])).logits for one in ids])
    assert torch.allclose(together, alone, atol=1e-4)


def test_control_strings_in_a_text_are_text_and_long_texts_keep_their_special_tokens(fetched):
    tokenizer = heads.load_tokenizer(fetched["minilm"])
    encoder = TextEncoder(tokenizer, 20)
    ids, long = encoder.encode(["a [SEP] b [PAD] c [CLS]", "word " * 100])
    assert sum(token in tokenizer.all_special_ids for token in ids) == 2  # the first and the last
    assert (len(long), long[0], long[-1]) == (20, tokenizer.cls_token_id, tokenizer.sep_token_id)
    decoder = heads.load_tokenizer(fetched["smollm2"])
    assert not set(TextEncoder(decoder, 50).encode(["x <|im_end|> y"])[0]) & set(
        decoder.all_special_ids
    )


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_of_a_long_text_the_ends_are_read_or_all_of_it_in_chunks(fetched, name):
    tokenizer, most = heads.load_tokenizer(fetched[name]), 20
    texts = [*TEXTS, *(" ".join(f"word{i}" for i in range(n)) for n in (3, 10, 17, 100))]
    whole = [
        tokenizer(TextEncoder(tokenizer, 512).neutralise([one])[0])["input_ids"] for one in texts
    ]
    body = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
    framing = len(whole[0]) - len(body[0])
    ends, chunks = (TextEncoder(tokenizer, most, how) for how in ("head_tail", "chunks"))
    for ids, all_ids in zip(ends.encode(texts), whole, strict=True):
        assert len(ids) == min(most, len(all_ids))
        head = (most - framing) // 4
        first, last = framing // 2 + head, framing // 2 + most - framing - head
        assert ids[:first] == all_ids[:first] and ids[-last:] == all_ids[-last:]
    assert chunks.encode(texts) == whole
    for ids in whole:
        parts = chunks.parts(ids)
        inner = [part[framing // 2 : len(part) - framing // 2] for part in parts]
        assert sum(inner, []) == ids[framing // 2 : len(ids) - framing // 2]
        assert len(parts) == max(1, -(-(len(ids) - framing) // (most - framing)))
        assert max(map(len, inner)) - min(map(len, inner)) <= 1
        for part in parts:
            assert part[: framing // 2] == ids[: framing // 2] and len(part) <= most


def test_a_text_in_chunks_is_trained_on_in_each_and_answered_by_their_mean(
    make_experiment, tiny_models
):
    settings = {"num_train_epochs": 3, "eval_steps": 0.5, "max_length": 32, "long_texts": "chunks"}
    settings |= {"learning_rate": 1e-2}
    words = ["market", "goal", "film", "bank", "cup", "star"]
    rows = [
        (f"{i} " + " ".join(words[(i + k // 25) % 6] for k in range(i % 75)), LABELS[i % 3])
        for i in range(90)
    ]
    write_csv("rows.csv", rows)
    encoder_keys = {"model": str(tiny_models["bert"]), "head": settings}
    drawn = {"validation": 12, "test": 24}
    experiment = make_experiment(
        "rows.csv", LABELS, data={"rows": drawn}, encoder_keys=encoder_keys
    )
    data.main(experiment)
    train.main(experiment, "bert")
    tokenizer = heads.load_tokenizer(tiny_models["bert"])
    encoder = TextEncoder(tokenizer, 32, "chunks")
    trained = results.read_rows(experiment, "decoder_train")
    pieces = [len(encoder.parts(ids)) for ids in encoder.encode([row["text"] for row in trained])]
    assert sum(pieces) > 1.5 * len(trained)
    lengths = read_json("data/mine/data_card.json")["token_lengths"]["encoder"]
    parts, _ = parts_of_texts(experiment.encoder.head, lengths)
    assert parts == pytest.approx(sum(pieces) / len(trained), rel=0.2)
    steps = 3 * -(-sum(pieces) // 16)
    texts = [row["text"] for row in results.read_rows(experiment, "test")]
    predicted = load_raw(experiment, f"bert@{steps}")(texts)
    lines = results.read_predictions(experiment, f"bert@{steps}", "test")
    evaluated = [[line["probabilities"][label] for label in LABELS] for line in lines]
    assert np.abs(predicted - evaluated).max() < 1e-4
    model = heads.load_head(
        experiment.run_folder / f"bert/checkpoints/checkpoint-{steps}", LABELS
    ).eval()
    differing = 0
    for text, answer in zip(texts, predicted, strict=True):
        with torch.inference_mode():
            of_parts = [
                model(input_ids=torch.tensor([part])).logits.double().softmax(-1)[0].numpy()
                for part in encoder.parts(encoder.encode([text])[0])
            ]
        assert np.abs(np.mean(of_parts, axis=0) - answer).max() < 1e-5
        differing += np.abs(of_parts[0] - answer).max() > 1e-3
    assert differing > len(texts) / 4
    result = experiment.results_folder / f"bert@{steps}.predictions.jsonl"
    before = result.read_text()
    result.unlink()
    train.main(experiment, "bert")  # scores the checkpoint
    assert [json.loads(line)["prediction"] for line in result.read_text().splitlines()] == [
        json.loads(line)["prediction"] for line in before.splitlines()
    ]
    read = results.read_result(experiment, f"bert@{steps}", "test").tokens
    lengths = [len(part) for ids in encoder.encode(texts) for part in encoder.parts(ids)]
    budget = experiment.eval.batch_tokens
    batches = heads.batches_of(sorted(lengths, reverse=True), budget)
    assert read == heads.padded_tokens(sorted(lengths, reverse=True), batches) < 2 * sum(lengths)
    with pytest.raises(LetterheadError, match="answers by the mean over a text's chunks"):
        export.main(experiment, f"bert@{steps}")
    otherwise = experiment.model_copy(deep=True)
    otherwise.encoder.head.long_texts = "head_tail"
    with pytest.raises(LetterheadError, match="was trained with another encoder.head"):
        load_raw(otherwise, f"bert@{steps}")


def test_few_rows_are_trained_on_for_the_least_steps_and_many_for_the_epochs():
    head = Head(
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        least_steps=200,
    )
    for rows, steps in ((81, 200), (400, 200), (1600, 200), (3200, 400)):
        on = head.on(rows)
        assert planned_steps(rows, 8, 2, on.num_train_epochs, on.eval_steps)[0] in (
            steps,
            steps + 1,
        )  # of rounding
    assert Head(num_train_epochs=2).on(10) == Head(num_train_epochs=2)


@pytest.mark.parametrize(
    ("section", "steps", "every"), [("encoder", 5625, 282), ("decoder", 1875, 94)]
)
def test_the_articles_parameters(fetched, tmp_path, section, steps, every):
    head = getattr(load_experiment("ag_news"), section).head
    arguments = heads.training_arguments(head, tmp_path, 42, None)
    batch = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.per_device_eval_batch_size,
    )
    assert batch == ((64, 1, 256) if section == "encoder" else (8, 8, 16))
    assert (arguments.learning_rate, arguments.lr_scheduler_type, arguments.weight_decay) == (
        1e-5,
        "cosine",
        1e-6,
    )
    assert arguments.adam_beta2 == 0.999  # HF's own
    assert arguments.num_train_epochs == (3 if section == "encoder" else 1)
    assert arguments.get_warmup_steps(steps) == 0 and arguments.train_sampling_strategy == "random"
    assert head.max_length == 512  # 510 tokens and BERT's two specials
    rows = Dataset.from_dict(
        {"input_ids": [[1]] * 120_000, "labels": [0] * 120_000, "length": [1] * 120_000}
    )
    model, tokenizer = (
        heads.load_head(fetched["minilm"], list("abcd")),
        heads.load_tokenizer(fetched["minilm"]),
    )
    trainer = heads.HeadTrainer(model, arguments, tokenizer, rows, {"test": rows})
    *_, max_steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    assert max_steps == steps
    found = steps_of(arguments, max_steps, "should_evaluate")
    assert (
        found == [*range(every, steps, every), steps] and len(found) == 20
    )  # the article's 19, and the last step


def test_groups_of_like_length_are_drawn_from_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 100, size=400).tolist()
    sampler = heads.EpochLengthGroupedSampler(8, lengths, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(400))
    sampler.set_epoch(1)
    second = list(sampler)
    resumed = heads.EpochLengthGroupedSampler(8, lengths, seed=1)
    resumed.set_epoch(1)
    assert second == list(resumed) != first
    padded = sum(8 * max(lengths[i] for i in first[k : k + 8]) for k in range(0, 400, 8))
    assert padded < 1.15 * sum(lengths)


def test_a_text_length_that_a_model_has_no_positions_for_is_an_error(fetched):
    heads.require_length(fetched["minilm"], 512, "encoder.head")
    with pytest.raises(
        LetterheadError, match=r"encoder.head.max_length is 513, but .* has 512 positions; lower it"
    ):
        heads.require_length(fetched["minilm"], 513, "encoder.head")


def test_predictions_come_back_in_the_rows_order_whatever_the_batches(fetched, tmp_path):
    set_seed(0)
    folder, classes = fetched["minilm"], np.arange(23) % 4
    rows = [{"text": "word " * int(n)} for n in np.random.default_rng(0).integers(1, 60, size=23)]
    tokenizer, model = heads.load_tokenizer(folder), heads.load_head(folder, list("abcd")).eval()
    encoder, seen = TextEncoder(tokenizer, 128), {}
    data = heads.encoded(rows, classes, encoder, "encoding")

    def note(split, logits, seconds, tokens):
        seen[split] = logits, tokens
        return {"mean": float(logits.mean())}

    arguments = heads.training_arguments(Head(per_device_eval_batch_size=4), tmp_path, 0, None)
    arguments.report_to = []
    trainer = heads.HeadTrainer(
        copy.deepcopy(model), arguments, tokenizer, data, {"test": data}, note, batch_tokens=100
    )
    metrics = trainer.evaluate()
    logits, tokens = seen["test"]
    assert math.isclose(metrics["eval_test_mean"], logits.mean(), rel_tol=1e-6)
    lengths, held = data["length"], heads.batches_of(data["length"], 100)
    assert sorted(row for rows in held for row in rows) == list(range(23)) and len(held) > 5
    sizes = [max(lengths[row] for row in rows) * len(rows) for rows in held]
    assert max(sizes) <= 100 and tokens == sum(sizes)
    with torch.inference_mode():
        alone = torch.cat(
            [model(input_ids=torch.tensor([ids])).logits for ids in data["input_ids"]]
        )
    assert np.abs(alone.numpy() - logits).max() < 1e-4


@pytest.mark.parametrize("name", ["bert", "smollm2"])
def test_a_packed_copy_evaluates_as_the_trainer_does_and_leaves_the_model_alone(
    tiny_models, tmp_path, name
):
    set_seed(0)
    model, tokenizer = (
        heads.load_head(tiny_models[name], list("abcd")),
        heads.load_tokenizer(tiny_models[name]),
    )
    before, data = copy.deepcopy(model.state_dict()), random_rows(30)
    arguments = heads.training_arguments(Head(per_device_eval_batch_size=4), tmp_path, 0, None)
    trainer = heads.HeadTrainer(model, arguments, tokenizer, data, {"test": data})
    packed = trainer._score("test", "eval_test")
    loader = trainer.get_eval_dataloader("test")
    theirs = Trainer.evaluation_loop(
        trainer, loader, "", prediction_loss_only=False, metric_key_prefix="eval_test"
    )
    assert np.abs(packed.predictions - theirs.predictions).max() < 1e-4
    assert (packed.label_ids == theirs.label_ids).all()
    assert math.isclose(
        packed.metrics["eval_test_loss"], theirs.metrics["eval_test_loss"], rel_tol=1e-4
    )
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("rows", [192, 180], ids=["whole steps", "a last step of 52 rows"])
@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_accumulated_batches_train_as_one_batch_does(tiny_models, tmp_path, name, rows):
    data = random_rows(rows)

    def train(batch: int, accumulation: int) -> tuple[list[tuple], dict[str, torch.Tensor]]:
        set_seed(0)
        model = heads.load_head(tiny_models[name], list("abcd"))
        for dropout in (
            module for module in model.modules() if isinstance(module, torch.nn.Dropout)
        ):
            dropout.p = 0.0
        head = Head(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
        )
        arguments = heads.training_arguments(head, tmp_path, 0, None)
        arguments.eval_strategy = arguments.save_strategy = "no"
        arguments.logging_steps, arguments.report_to = 1, []
        trainer = heads.HeadTrainer(model, arguments, heads.load_tokenizer(tiny_models[name]), data)
        trainer.train()
        log = [
            (line["loss"], line["grad_norm"])
            for line in trainer.state.log_history
            if "grad_norm" in line
        ]
        return log, model.state_dict()

    (split, split_weights), (whole, whole_weights) = train(8, 8), train(64, 1)
    assert len(split) == len(whole) == 3
    assert np.allclose(split, whole, rtol=1e-4), (split, whole)
    assert 1 < whole[0][0] < 4  # cross-entropy of four classes, untrained
    assert all(
        torch.allclose(split_weights[key], whole_weights[key], atol=1e-5) for key in whole_weights
    )


def random_rows(n: int) -> Dataset:
    """Rows of random ids and classes of four."""
    generator = np.random.default_rng(0)
    ids = [
        generator.integers(1000, 3000, size=size).tolist()
        for size in generator.integers(5, 40, size=n)
    ]
    labels = generator.integers(0, 4, size=n).tolist()
    return Dataset.from_dict(
        {"input_ids": ids, "labels": labels, "length": [len(one) for one in ids]}
    )


@pytest.mark.parametrize(
    "losses",
    [None, [0.9, 0.5, 0.6, 0.7, 0.4, 0.8, 0.8, 0.9, 0.8, 0.7]],
    ids=["no validation", "validation"],
)
def test_only_the_best_the_last_and_now_and_then_one_is_saved_and_saving_is_clocked(
    tiny_models, tmp_path, losses
):
    data, seen, saved = random_rows(80), iter(losses or []), []
    head = Head(per_device_train_batch_size=8, num_train_epochs=1, eval_steps=0.1)
    arguments = heads.training_arguments(
        head, tmp_path, 0, "validation_log_loss" if losses else None
    )
    arguments.report_to = []
    model, tokenizer = (
        heads.load_head(tiny_models["bert"], list("abcd")),
        heads.load_tokenizer(tiny_models["bert"]),
    )

    def note(split, *_):
        return {"log_loss": next(seen)} if losses else {}

    class Slow(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append((state.global_step, trainer.saving_seconds))

    trainer = heads.HeadTrainer(
        model, arguments, tokenizer, data, {"validation" if losses else "test": data}, note
    )
    trainer.add_callback(Slow())
    trainer.train()
    assert [step for step, _ in saved] == ([1, 2, 4, 5, 8, 10] if losses else [4, 8, 10])
    assert 0 < saved[0][1] < saved[-1][1]
    kept = {path.name: (path / "optimizer.pt").exists() for path in tmp_path.glob("checkpoint-*")}
    assert kept == (
        {"checkpoint-5": False, "checkpoint-10": True}
        if losses
        else {"checkpoint-8": False, "checkpoint-10": True}
    )


def test_the_loss_over_the_options_starts_from_sfts_scores_and_is_predicted_as_it_is_evaluated(
    make_experiment,
):
    write_csv("rows.csv", [(f"text {i} of {LABELS[i % 3]} news", LABELS[i % 3]) for i in range(60)])
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "eval_steps": 0.5,
        "learning_rate": 1e-2,
    }
    rows = {"validation": 12, "test": 12}
    experiment = make_experiment(
        "rows.csv", LABELS, data={"rows": rows}, decoder_keys={"sft_options": settings}
    )
    data.main(experiment)
    encoder = load_prompt_encoder(experiment)
    texts = [row["text"] for row in results.read_rows(experiment, "test")]
    options = OptionEncoder(encoder)
    untrained = heads.classify(
        load_folded(experiment, encoder).eval(), encoder.tokenizer, options.encode(texts), 512
    )
    decoder = load_decoder(experiment.decoder.folder, "float32")
    scores = score_options(
        decoder, [encoder.encode(text) for text in texts], encoder.answers, False, 2048
    )
    assert np.abs(untrained - scores.probabilities("mean")).max() < 1e-4
    train.main(experiment, "sft_options")
    found = results.read_result(experiment, "sft_options@10", "test")
    lines = results.read_predictions(experiment, "sft_options@10", "test")
    predicted = load_raw(experiment, "sft_options@10")(texts)
    assert (
        np.abs(
            predicted - [[line["probabilities"][label] for label in LABELS] for line in lines]
        ).max()
        < 1e-4
    )
    assert np.abs(predicted - untrained).max() > 0.01
    assert found.train_loss < results.read_result(experiment, "sft_options@5", "test").train_loss
    again = read_json(experiment.run_folder / "sft-options" / "stage.json")
    train.main(experiment, "sft_options")
    assert again == read_json(experiment.run_folder / "sft-options" / "stage.json")


def test_names_of_several_tokens_have_a_score_each_that_starts_as_their_mean(make_experiment):
    labels = [f"card_{'lost' if i % 2 else 'arrival'}_number_{i}" for i in range(30)]
    write_csv("rows.csv", [(f"text {i} of {labels[i % 30]}", labels[i % 30]) for i in range(210)])
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 10,
        "eval_steps": 0.5,
        "learning_rate": 1e-2,
    }
    experiment = make_experiment(
        "rows.csv",
        labels,
        data={"rows": {"validation": 30, "test": 30}},
        prompt={"options": "names", "template": "{text}\nWhich?"},  # lists no names
        decoder_keys={"sft_options": settings},
    )
    data.main(experiment)
    encoder = load_prompt_encoder(experiment)
    start = load_folded(experiment, encoder)
    answer = encoder.answers[7]
    spelled = answer.ids[answer.start : answer.stop]
    projection = load_decoder(experiment.decoder.folder, "float32", packed=False)
    rows = projection.get_output_embeddings().weight[spelled]
    assert len(spelled) > 2
    assert torch.allclose(start.score.weight[7], rows.mean(dim=0), atol=1e-6)
    train.main(experiment, "sft_options")
    lines = results.read_predictions(experiment, "sft_options@15", "test")
    texts = [row["text"] for row in results.read_rows(experiment, "test")]
    predicted = load_raw(experiment, "sft_options@15")(texts)
    kept = [[line["probabilities"][label] for label in labels] for line in lines]
    assert predicted.shape == (30, 30) and np.abs(predicted - kept).max() < 1e-4
