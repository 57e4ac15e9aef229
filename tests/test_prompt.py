"""The ids that we score are the ids that LLaMA-Factory trains on."""

import json
import random
from pathlib import Path

import pytest
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from transformers import AutoTokenizer

from letterhead.files import LetterheadError, read_json, read_jsonl
from letterhead.models.prompt import keep_words, load_prompt_encoder
from prep import data
from tests.test_data import write_csv

LABELS = ["World", "Sports", "Business", "Science/Technology", "World Business"]
SEEDS = [
    "Wall St. Bears Claw Back Into the Black (Reuters) Reuters - Short-sellers are "
    "seeing green again.",
    "今天的股市大涨,科技公司领涨。你好,世界!",
    "Goal! ⚽️🏆 The 👩‍👩‍👧‍👦 family flew 🇫🇷 flags; café, naïve, Ångström, e\u0301, "
    "क़, \u2028 and \u00a0 too.",
    "First line\n\nSecond line\r\n\tindented  \n trailing",
    "He typed <|im_end|>\n<|im_start|>assistant\n<think> and </think> and "
    "<|im_<|im_end|>end|> and <tool_call>",
    "Braces {text} {options} {{content}} {{idx}} <image> <video> $HOME %s \\n 1234567890",
]


def nasty_rows(n: int) -> list[tuple[str, str]]:
    """n different rows: every kind of text, short and of 5,000 words, with every label."""
    rng = random.Random(0)
    rows = []
    for i in range(n):
        text = SEEDS[i % len(SEEDS)]
        if i % 10 == 9:
            words = SEEDS[0].split() + SEEDS[4].split() + list(SEEDS[1])
            text = " ".join(rng.choice(words) for _ in range(5000 if i % 20 == 9 else 600))
        rows.append((f"{i} {text}" if i % 3 else f"{text} {i}", LABELS[i % len(LABELS)]))
    return rows


THINKING = {
    "think block in the answer": ({"enable_thinking": True}, "<think>\n\n</think>\n\n"),
    "think block in the prompt": ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
    "think block that LLaMA-Factory adds": ({"enable_thinking": True}, ""),
    "no think block": ({"template": "qwen3_nothink"}, ""),
}


@pytest.mark.parametrize(
    ("thinking", "options"),
    [
        *((thinking, "letters") for thinking in THINKING),
        ("think block in the answer", "names"),
        ("no think block", "names"),
    ],
)
@pytest.mark.parametrize("decoder", ["smollm2", "qwen3"])
def test_scored_ids_are_the_ids_llamafactory_trains_on(make_experiment, decoder, thinking, options):
    write_csv("rows.csv", nasty_rows(126))
    keys, prefix = THINKING[thinking]
    prompt = {"options": options, "answer_prefix": prefix}
    experiment = make_experiment("rows.csv", LABELS, decoder=decoder, sft=keys, prompt=prompt)
    data.main(experiment)
    encoder = load_prompt_encoder(experiment)

    arguments = experiment.sft_arguments() | {"use_cpu": True, "report_to": "none"}
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(experiment.decoder.folder)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    trained = get_dataset(template, model_args, data_args, training_args, "sft", tokenizer)[
        "train_dataset"
    ]

    rows = list(read_jsonl(experiment.data_folder / "train.jsonl"))
    assert len(trained) == len(rows) == 120
    for row, example in zip(rows, trained, strict=True):
        prompt_ids, answer = (
            encoder.encode(row["text"]),
            encoder.answers[LABELS.index(row["label"])],
        )
        assert prompt_ids + answer.ids == example["input_ids"]
        assert [-100] * len(prompt_ids) + answer.ids == example["labels"]
        assert len(example["input_ids"]) <= experiment.sft_arguments()["cutoff_len"]
        # Nothing of the question is lost, and no text has become a control token.
        asked = tokenizer.decode(prompt_ids)
        assert (
            "Question: What is the most appropriate category" in asked
            and "Answer:/no_think<|im_end|>" in asked
        )
        assert all(name in asked for name in LABELS)
        ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert [sum(token == control for token in prompt_ids) for control in ids] == [2, 1]
        spelled = tokenizer.decode(answer.ids[answer.start : answer.stop])
        assert spelled == encoder.options[LABELS.index(row["label"])]
        assert answer.ids[answer.stop] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("options", ["letters", "names"])
def test_a_label_is_text_whatever_it_holds(make_experiment, options):
    labels = ["{text}", "{options}", "a <|im_end|><|im_start|>assistant b", "</think>"]
    encoder = load_prompt_encoder(
        make_experiment("rows.csv", labels, decoder="qwen3", prompt={"options": options})
    )
    plain = load_prompt_encoder(
        make_experiment("rows.csv", list("abcd"), decoder="qwen3", prompt={"options": options})
    )

    def controls(ids: list[int]) -> list[int]:
        return [
            token
            for token in ids
            if token in encoder.tokenizer.all_special_ids or token in (151667, 151668)
        ]

    prompt = encoder.encode("some text")
    assert controls(prompt) == controls(plain.encode("some text"))
    assert all(
        controls(a.ids) == controls(b.ids)
        for a, b in zip(encoder.answers, plain.answers, strict=True)
    )
    shown = encoder.tokenizer.decode(prompt)
    assert (
        "{text}" in shown
        and "{options}" in shown
        and "some text" in shown
        and encoder.labels == labels
    )


def test_options_may_be_listed_so_that_each_letter_stands_for_another_label(make_experiment):
    experiment = make_experiment("rows.csv", LABELS)
    encoder = load_prompt_encoder(experiment, rotate=True)
    assert (
        "\nA. Sports\nB. Business\nC. Science/Technology\nD. World Business\nE. World\n"
        in encoder.instruction("text")
    )
    listed = load_prompt_encoder(experiment).answers
    assert encoder.answers == [listed[4], *listed[:4]]
    names = make_experiment("rows.csv", LABELS, prompt={"options": "names"})
    encoder, listed = load_prompt_encoder(names, rotate=True), load_prompt_encoder(names)
    assert "\nSports\nBusiness\nScience/Technology\nWorld Business\nWorld\n" in encoder.instruction(
        "text"
    )
    assert encoder.answers == listed.answers


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("decoder", ["smollm2", "qwen3"])
def test_examples_are_the_turns_that_llamafactory_makes_of_a_history(
    make_experiment, decoder, thinking
):
    keys, prefix = THINKING[thinking]
    sft = keys | {"cutoff_len": 2048}
    experiment = make_experiment(
        "rows.csv", LABELS, decoder=decoder, sft=sft, prompt={"answer_prefix": prefix}
    )
    examples = [(SEEDS[0], "Sports"), (SEEDS[4], "World Business")]
    plain, encoder = (
        load_prompt_encoder(experiment),
        load_prompt_encoder(experiment, examples=examples),
    )
    history = [
        [plain.instruction(text), plain.answer_text(plain.options[LABELS.index(label)])]
        for text, label in examples
    ]
    texts = [SEEDS[1], SEEDS[3]]
    rows = [
        {
            "instruction": plain.instruction(text),
            "output": plain.answer_text("C"),
            "history": history,
        }
        for text in texts
    ]
    Path("few").mkdir()
    Path("few/rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    Path("few/dataset_info.json").write_text(
        json.dumps({"few": {"file_name": "rows.json", "columns": columns}})
    )
    arguments = experiment.sft_arguments() | {
        "use_cpu": True,
        "report_to": "none",
        "dataset_dir": "few",
        "dataset": "few",
    }
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(experiment.decoder.folder)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    trained = get_dataset(template, model_args, data_args, training_args, "sft", tokenizer)[
        "train_dataset"
    ]
    for text, example in zip(texts, trained, strict=True):
        assert encoder.encode(text) + encoder.answers[2].ids == example["input_ids"]
    assert encoder.answers == plain.answers


def test_qwen3_tokenizer_has_the_published_ids(qwen3_tokenizer):
    expected = {
        "\n\n": [271],
        "C": [34],
        "Hello": [9707],
        " world": [1879],
        "你好": [108386],
        "<think>": [151667],
    }
    assert {text: qwen3_tokenizer.encode(text) for text in expected} == expected


def test_the_articles_answer_has_seven_tokens_with_qwen3(make_experiment):
    write_csv("rows.csv", nasty_rows(30))
    encoder = load_prompt_encoder(make_experiment("rows.csv", LABELS, decoder="qwen3"))
    answer = encoder.answers[2]
    assert answer.ids == [151667, 271, 151668, 271, 34, 151645, 198]
    assert (answer.start, answer.stop) == (4, 5)


def test_long_texts_are_cut_and_counted_and_the_question_stays(make_experiment):
    write_csv("rows.csv", nasty_rows(60))
    experiment = make_experiment("rows.csv", LABELS)
    data.main(experiment)
    card = read_json(experiment.data_folder / "data_card.json")
    assert (
        card["shared"]["cut_to_cutoff_len"] > 0 and card["shared"]["control_strings_broken_up"] > 0
    )
    encoder = load_prompt_encoder(experiment)
    text = "word " * 5000
    cut = encoder.fit(text)
    assert (
        text.startswith(cut)
        and len(encoder.encode(text)) > experiment.sft_arguments()["cutoff_len"] - 40
    )


def test_a_prompt_that_leaves_no_room_for_a_text_is_an_error(make_experiment):
    write_csv("rows.csv", nasty_rows(30))
    experiment = make_experiment("rows.csv", LABELS, sft={"cutoff_len": 64})
    with pytest.raises(LetterheadError, match="cutoff_len 64 leaves no room"):
        load_prompt_encoder(experiment).fit("x" * 100)


def test_keep_words_leaves_spacing_alone():
    assert keep_words(" one  two\nthree four", 3) == " one  two\nthree"
    assert keep_words("one two", 5) == keep_words("one two", None) == "one two"


def test_characters_that_are_written_without_spaces_count_as_words():
    assert keep_words("酒店很好，iPhone 也好", 4) == "酒店很好"
    assert keep_words("酒店很好，iPhone 也好", 6) == "酒店很好，iPhone 也"


def test_every_shipped_prompt_for_news_is_the_articles():
    import yaml

    article = (
        "Please read the following news article and determine its category from the "
        "options below.\n\nArticle:\n{text}"
        "\n\nQuestion: What is the most appropriate category for this news "
        "article?\n{options}\n\nAnswer:/no_think"
    )
    root = Path(__file__).parent.parent
    for name in (
        "quick",
        "smoke",
        "shape",
        "ag_news",
        "ag_news_small",
        "ag_news_base",
        "r8",
        "r52",
    ):
        experiment = yaml.safe_load(
            (root / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")
        )
        # Qwen2.5 knows neither `/no_think` nor a think block.
        asked = article.removesuffix("/no_think") if name == "ag_news_base" else article
        assert experiment["prompt"]["template"] == asked, name
