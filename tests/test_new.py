"""make new: from a file to an experiment that loads, with the right columns and labels, and a
reason for each choice."""

import json
from pathlib import Path

import openpyxl
import pytest

from letterhead.config.experiment import load_experiment
from letterhead.config.models import E5
from letterhead.files import LetterheadError, read_json
from letterhead.models.prompt import load_prompt_encoder
from letterhead.pipeline import METHODS
from letterhead.plan.evidence import contenders, evidence, margin_finder
from letterhead.rows.sources import open_source
from letterhead.stats.decision import smallest_margin
from prep import new
from tests.conftest import ROOT
from tests.test_balance import skewed
from tests.test_data import write_csv


@pytest.fixture
def place(workplace, fetched, monkeypatch):
    """A folder like the repository's; models lie where they were fetched to."""
    for name in ("llamafactory_configs", "model", ".cache"):
        Path(name).symlink_to(ROOT / name)
    Path("experiments").mkdir()
    Path("experiments/models").symlink_to(ROOT / "experiments/models")
    return workplace


@pytest.fixture
def written(place, monkeypatch):
    """Write an experiment for a source; its rows are not made."""
    monkeypatch.setattr(new.data, "main", lambda *_, **__: None)
    monkeypatch.setattr(new, "foretell", lambda _: "a while")
    for choose in ("choose_balance", "choose_contenders", "choose_margin"):
        monkeypatch.setattr(new, choose, lambda *_, **__: ({}, ""))

    def write(source: str, **columns: str):
        new.main(source, **columns)
        return load_experiment(Path(source).stem)

    return write


def words(i: int, n: int) -> str:
    return " ".join(f"word{(i * 7 + k * 3) % 50}" for k in range(n))


def test_two_texts_an_id_a_numbered_label_and_its_names(place, capsys):
    header, kinds = ("id", "subject", "body", "kind_id", "kind"), ["low"] * 8 + ["high", "urgent"]
    rows = [
        (i, f"Subject {i}", "" if i == 5 else words(i, 90), max(0, i % 10 - 7), kinds[i % 10])
        for i in range(300)
    ]
    write_csv("tickets.csv", [*rows, (300, "No kind", "at all, but words enough", "", "")], header)
    new.main("tickets.csv")
    experiment = load_experiment("tickets")
    assert (
        experiment.data.columns.text == ["subject", "body"]
        and experiment.data.columns.label == "kind"
    )
    assert experiment.labels == ["high", "low", "urgent"] and experiment.prompt.options == "letters"
    assert experiment.data.max_words == new.MAX_WORDS and experiment.data.bad_rows == "drop"
    card = read_json("data/tickets/data_card.json")
    assert (
        card["rows"]["test"] == 60
        and card["dropped"]["bad row"] == 1
        and card["shared"]["rows"] == experiment.decoder.train_rows
    )
    said = capsys.readouterr().out
    assert "GB of disk at the most on this machine" in said
    for reason in (
        "which names what 'kind_id' numbers",
        "imbalanced",
        "1 of 301 rows lack",
        "low 240",
    ):
        assert reason in said and reason in Path("experiments/tickets.yaml").read_text()
    before = Path("experiments/tickets.yaml").read_bytes()
    with pytest.raises(
        LetterheadError, match=r"experiments/tickets.yaml: is there already and is not overwritten"
    ):
        new.main("tickets.csv")
    assert Path("experiments/tickets.yaml").read_bytes() == before


def test_many_classes_are_answered_by_name_and_rare_ones_left_out(written):
    rows = [{"text": f"{i} {words(i, 20)}", "label": f"class {i % 40}"} for i in range(800)]
    rows.append({"text": words(1, 9), "label": "rare"})
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = written("many.jsonl")
    assert len(experiment.labels) == 40 and experiment.data.labels["rare"] is None
    assert experiment.prompt.options == "names" and experiment.eval.score == "sum"
    assert (
        experiment.sft_arguments()["num_train_epochs"] * 100 >= 20 * 26
        and experiment.encoder.head.num_train_epochs == 20
    )


@pytest.mark.parametrize("rare", [0.1, 0.45], ids=["rare", "not rare"])
def test_a_rare_class_gets_weights_where_validation_rows_say_so(place, rare):
    write_csv("mail.csv", skewed(1200, rare, 1))
    new.main("mail.csv")
    experiment = load_experiment("mail")
    text = Path("experiments/mail.yaml").read_text()
    assert experiment.balance == ("weights" if rare == 0.1 else "none")
    whole = read_json("data/mail/data_card.json")
    rows = whole["rows"]["test"]
    least = margin_finder(experiment, whole)(rows, contenders(experiment))
    assert least > smallest_margin(rows, contenders(experiment)) or rare == 0.45
    assert 2 * least <= experiment.compare.margin < 4 * least
    assert f"# - compare.margin: {experiment.compare.margin:g}; {rows} test rows" in text
    assert "can show a margin of" in evidence(experiment, read_json("data/mail/data_card.json"))
    assert ("# - balance: weights; the largest class has" in text) == (rare == 0.1)
    card = read_json("data/mail/data_card.json")["shared"]
    assert (card["sft_rows"] > card["rows"]) == (rare == 0.1)


def test_chinese_texts_get_models_that_read_them(written):
    write_csv(
        "zh.csv",
        [("正面" if i % 2 else "负面", f"第{i}条评论" + "内容还不错" * 20) for i in range(200)],
        ("kind", "content"),
    )
    experiment = written("zh.csv")
    assert (
        experiment.decoder.folder.name.startswith("Qwen2.5")
        and "{text}" in experiment.prompt.template
    )
    assert experiment.encoder.model == E5 and "请" in experiment.prompt.template
    assert experiment.data.columns.text == "content" and experiment.prompt.answer_prefix == ""
    assert (
        experiment.data.max_words == 64
        and experiment.sft_arguments()["per_device_train_batch_size"] == 4
    )


OTHERS = {
    "German": "Die Börse schloss am Montag schwächer, sagt der Händler über das Straßenfest",
    "Japanese": "東京の株価が下落した。サッカー日本代表が勝利しました",
    "Russian": "Акции упали в Москве, и мы не знаем, что это значит",
    "Spanish": "Las acciones cayeron en Madrid según el índice más grande",
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_texts_of_other_languages_get_models_that_read_them_and_english_ones_do_not(written, text):
    rows = [("up" if i % 2 else "down", f"{text} {i}" + " und so" * (i % 2)) for i in range(200)]
    write_csv("rows.csv", rows, ("kind", "content"))
    experiment = written("rows.csv")
    assert experiment.encoder.model == E5 and experiment.encoder.prefix == "query: "
    assert experiment.decoder.folder.name.startswith("Qwen2.5")
    assert "Please read the text" in experiment.prompt.template
    assert experiment.prompt.answer_prefix == ""


def test_english_is_told_by_its_letters_or_its_frequent_words():
    english = ["The café won", "shares fell after a warning from the bank", "word7 word8"]
    assert new.is_english(english) and new.is_english(english[2:])
    for text in OTHERS.values():
        assert not new.is_english([text])
    assert not new.is_english(
        ["La città ha vinto la finale", "Die Börse schloss nach einer Warnung"]
    )


def test_a_folder_names_its_labels_and_few_rows_are_trained_on_longer(written):
    for i in range(120):
        path = Path("mails", "spam" if i % 3 else "ham", f"{i}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{i} {words(i, 12)}")
    experiment = written("mails/")
    assert experiment.labels == ["ham", "spam"] and experiment.data.columns.text == "text"
    # Of 81 rows, 4 a step: at least two hundred steps
    assert experiment.sft_arguments()["num_train_epochs"] == 10
    assert experiment.decoder.sft_options.num_train_epochs == 10


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (
            "id,price",
            lambda i: (i, i * 1.5),
            "no column looks like a label .* among id .100 distinct",
        ),
        ("price,label", lambda i: (i * 1.5, "ab"[i % 2]), "no column looks like a text"),
        (
            "text,label",
            lambda i: (f"{i} {words(i, 9)}", "a" if i else "b"),
            "fewer than two labels have 10 rows",
        ),
    ],
)
def test_data_that_cannot_be_guessed_are_refused_with_what_was_seen(written, header, row, message):
    write_csv("odd.csv", [row(i) for i in range(100)], header.split(","))
    with pytest.raises(LetterheadError, match=message):
        written("odd.csv")
    assert not Path("experiments/odd.yaml").exists()


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029"])
def test_no_label_writes_keys_of_its_own(written, end):
    hostile = f"x{end}distill: {{endpoint: 'https://127.0.0.1:1/v1', model: m}}{end}#"
    rows = [
        (f"{i} {words(i, 9)}", ["a", "b", hostile][min(i % 40, 2) if i % 40 < 3 else i % 2])
        for i in range(400)
    ]
    write_csv("labels.csv", rows)
    experiment = written("labels.csv")
    assert experiment.distill is None and {"a", "b"} <= set(experiment.labels)


@pytest.mark.parametrize(
    "labels", [("1e1", "2e2"), ("yes", "no"), ("0x1F", "1_000"), ("null", "~"), ("12:30", "@at")]
)
def test_labels_that_yaml_reads_otherwise_stay_what_they_are(written, labels):
    write_csv("odd.csv", [(f"{i} {words(i, 9)}", labels[i % 2]) for i in range(100)])
    assert set(written("odd.csv").labels) == set(labels)


def test_blank_lines_that_a_spreadsheet_left_and_columns_of_one_name_change_nothing(written):
    rows = [(words(i, 8), "ab"[i % 2], "", "") for i in range(200)]
    write_csv("clean.csv", rows, ["text", "kind", "", ""])
    write_csv("blank.csv", [*rows, *[("",) * 4] * 5000], ["text", "kind", "", ""])
    clean, blank = (written(f"{name}.csv").data for name in ("clean", "blank"))
    assert clean.columns.label == "kind" and blank == clean.model_copy(
        update={"source": "blank.csv"}
    )


def test_what_would_tell_the_label_is_no_text_and_a_users_name_neither(written):
    kinds = ["cancel the order", "where is my parcel", "talk to a person"]
    rows = [
        (i % 3, kinds[i % 3], f"user number {i % 90}", f"{i} {words(i, 9)}") for i in range(300)
    ]
    write_csv("intents.csv", rows, ("intent", "intent_title", "user_name", "utterance"))
    experiment = written("intents.csv")
    assert (
        experiment.data.columns.text == "utterance"
        and experiment.data.columns.label == "intent_title"
    )


def test_what_else_could_be_meant_is_told_and_the_user_may_say_it(written, capsys):
    header = ("overall", "verified", "reviewText", "summary", "id")
    rows = [
        (i % 5, i % 2, f"{i} {words(i, 30)}", f"{i} {words(i, 5)}", f"{i:036x}") for i in range(300)
    ]
    write_csv("amazon.csv", rows, header)
    experiment = written("amazon.csv")
    assert (experiment.data.columns.text, experiment.data.columns.label) == (
        "reviewText",
        "overall",
    )
    said = capsys.readouterr().out
    assert "'overall' (it could be 'verified', too: LABEL=…)" in said
    assert "'reviewText' (it could be 'summary', too: TEXT=…)" in said
    Path("experiments/amazon.yaml").unlink()
    experiment = written("amazon.csv", text="summary, reviewText", label="verified")
    assert (
        experiment.data.columns.text == ["summary", "reviewText"]
        and experiment.data.columns.label == "verified"
    )
    Path("experiments/amazon.yaml").unlink()
    for told, message in (
        ({"label": "stars"}, "LABEL=stars: no column 'stars'"),
        ({"text": "id,body"}, "TEXT=id,body: no .*'body'"),
        (
            {"label": "reviewText"},
            "LABEL=reviewText: 300 different values in 300 rows are no classes",
        ),
    ):
        with pytest.raises(LetterheadError, match=message):
            written("amazon.csv", **told)
    Path("bare.csv").write_text("text,label\n")
    with pytest.raises(LetterheadError, match="bare.csv: has no rows below its header"):
        written("bare.csv")


def test_an_id_of_many_characters_is_no_text_and_codes_have_names(written):
    rows = [
        (f"{i:036x}", f"say {i} {words(i, 2)}", f"C0{i % 3}", f"kind of {i % 3}")
        for i in range(200)
    ]
    write_csv("short.csv", rows, ("id", "utterance", "intent", "intent_name"))
    columns = written("short.csv").data.columns
    assert (columns.text, columns.label) == ("utterance", "intent_name")


def test_a_file_of_a_chinese_spreadsheet_is_read(written):
    header = ("编号", "标题", "正文", "来源", "类别")
    rows = [
        (
            i,
            f"第{i}条新闻",
            f"今天第{i}次说到" + "足球比赛很好看" * 3,
            "报纸",
            ["体育", "财经", "国际"][i % 3],
        )
        for i in range(150)
    ]
    lines = [",".join(map(str, row)) for row in (header, *rows)]
    Path("新闻.csv").write_bytes("\r\n".join(lines).encode("gb18030"))
    experiment = written("新闻.csv")
    assert experiment.data.encoding == ["utf-8", "gb18030"] and experiment.labels == [
        "体育",
        "国际",
        "财经",
    ]
    assert (
        experiment.data.columns.text == ["标题", "正文"] and experiment.data.columns.label == "类别"
    )


def test_a_header_that_cannot_be_read_tells_the_mend(written):
    Path("quote.csv").write_text('"text" ,label\na,b\n')
    with pytest.raises(LetterheadError, match="quote.csv, header: a broken quote or field"):
        written("quote.csv")


LINES = [(f"{i} {words(i, 9)}", ["good", "bad"][i % 2]) for i in range(90)]


def test_of_a_large_file_even_rows_are_looked_at_and_all_labels_counted(
    written, capsys, monkeypatch
):
    monkeypatch.setattr(new, "SAMPLE", 100)
    kinds = ["ham"] * 700 + ["spam"] * 285 + ["rare"] * 15  # sorted, as files often are
    lines = [(f"{i} {words(i, 9)}", kind) for i, kind in enumerate(kinds)]
    write_csv("large.csv", [*lines[:501], ("", "ham"), *lines[501:]])
    experiment = written("large.csv")
    said = capsys.readouterr().out
    assert "looked at one of every 16 of 1,001 rows" in said
    assert "labels: 3, with different texts: ham 700, spam 285, rare 15" in said
    assert experiment.labels == ["ham", "rare", "spam"] and experiment.data.bad_rows == "drop"
    assert experiment.data.rows.test == 200
    for split, rows in (("train", lines), ("validation", lines[:37]), ("test", lines[:5])):
        write_csv(f"own/{split}.csv", rows)
    new.main("own/{split}.csv")
    found = load_experiment("own").data.rows
    assert (found.validation, found.test) == (37, None)


def test_a_question_as_a_columns_name_is_a_name(written):
    asked = "How satisfied are you with the service that you got today?"
    write_csv(
        "form.csv",
        [(f"{i} {words(i, 9)}", ["good", "bad"][i % 2]) for i in range(90)],
        [asked, "mark"],
    )
    experiment = written("form.csv")
    assert experiment.data.header is None and experiment.data.columns.text == asked


@pytest.mark.parametrize(("classes", "is_listed"), [(30, True), (77, False)])
def test_more_classes_than_letters_are_names_that_fit_into_the_prompt(
    written, capsys, fetched, classes, is_listed
):
    names = [f"c{i}" if is_listed else f"some_intent_of_many_{i}" for i in range(classes)]
    write_csv("many.csv", [(f"{i} {words(i, 9)}", names[i % classes]) for i in range(20 * classes)])
    experiment = written("many.csv")
    assert experiment.prompt.options == "names" and len(experiment.labels) == classes
    assert ("{options}" in experiment.prompt.template) == is_listed
    if is_listed:  # before the text, so that all prompts begin alike
        assert experiment.prompt.template.index("{options}") < experiment.prompt.template.index(
            "{text}"
        )
    assert experiment.decoder.train_rows == max(400, 10 * classes)
    assert experiment.decoder.sft_options is not None
    encoder = load_prompt_encoder(experiment, folder=fetched["smollm2"])
    assert encoder.text_budget > 150
    said = "lists them before the text" if is_listed else "does not list them"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hours", "left_out", "epochs"),
    [
        (8, [], 15),
        (4, ["sft"], 15),
        (2, ["sft", "setfit", "sft_options"], 7),
        (1, ["sft", "setfit", "sft_options", "linear_head"], 3),
        (0.1, ["sft", "setfit", "sft_options", "linear_head", "bert", "bert_all"], 15),
        (0.01, ["sft", "setfit", "sft_options", "linear_head", "bert", "bert_all"], 15),
    ],
)
def test_on_a_slow_machine_contenders_are_left_out_until_the_report_fits(
    place, monkeypatch, capsys, hours, left_out, epochs
):
    takes = {"sft": 100, "setfit": 20, "sft_options": 60, "linear_head": 40, "bert": 2}
    of_bert = 5  # minutes an epoch

    def seconds(experiment, card):
        kept = {name: n for name, n in takes.items() if name not in experiment.leave_out}
        if "bert_all" not in experiment.leave_out:
            kept["bert_all"] = of_bert * experiment.encoder.head.num_train_epochs
        stages = {METHODS[name].stage: 60 * n for name, n in kept.items()}
        return stages | {"embedding": 240}

    monkeypatch.setattr(new, "stage_seconds", seconds)
    rows = [(f"Row {i}: {words(i, 9)}", f"kind {'abcdefg'[i % 7]}") for i in range(900)]
    write_csv("slow.csv", rows)
    monkeypatch.setattr(new, "MOST_ENCODER_STEPS", 15 * 38)
    new.main("slow.csv", hours=hours)
    experiment, said = load_experiment("slow"), capsys.readouterr().out
    assert experiment.leave_out == left_out
    assert experiment.encoder.head.num_train_epochs == epochs
    assert experiment.encoder.head.patience == 3  # what else was chosen stays
    assert ("delete this file and say HOURS=6" in said) == bool(left_out)
    assert ("still more than HOURS=0.01" in said) == (hours == 0.01)
    # What is in contention decides the margin that can be shown.
    methods = contenders(experiment)
    assert f"test rows and {methods} methods" in said


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        ("semicolons.csv", "text;label\n" + "".join(f"{t};{c}\n" for t, c in LINES), {}),
        ("tabs.csv", "text\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in LINES), {}),
        ("bare.csv", "".join(f"{t},{c}\n" for t, c in LINES), {"header": False}),
        ("chinese.txt", "".join(f"{c}\t{t}\n" for t, c in LINES), {}),
        ("fast.txt", "".join(f"__label__{c} {t}\n" for t, c in LINES), {}),
        (
            "alpaca.json",
            json.dumps([{"instruction": "Which?", "input": t, "output": c} for t, c in LINES]),
            {},
        ),
    ],
)
def test_people_s_files_are_understood_as_they_are(written, capsys, name, content, keys):
    Path(name).write_text(content)
    experiment = written(name)
    assert experiment.labels == ["bad", "good"] and experiment.data.header is keys.get("header")
    first = next(iter(open_source(experiment.data).splits["train"]))
    assert (first.text, first.label) == LINES[0]
    assert ("header: false" in capsys.readouterr().out) == bool(keys)


def test_a_sheet_is_named_and_others_are_told(written, capsys):
    book = openpyxl.Workbook()
    book.active.append(["only", "notes"])
    sheet = book.create_sheet("reviews")
    for row in [("text", "label"), *LINES]:
        sheet.append(row)
    book.save("book.xlsx")
    experiment = written("book.xlsx", sheet="reviews")
    assert experiment.data.sheet == "reviews" and experiment.labels == ["bad", "good"]
    assert "sheet: 'reviews'; it could be 'Sheet', too: SHEET=…" in capsys.readouterr().out
    Path("a.csv").write_text("text,label\n")
    with pytest.raises(LetterheadError, match=r"SHEET=x: a.csv is no workbook"):
        written("a.csv", sheet="x")


def test_published_splits_stay_and_a_label_that_stands_only_twice_is_left_out(written, capsys):
    rows = [(f"{i} {words(i, 9)}", "ab"[i % 2]) for i in range(900)]
    for split, of in (
        ("train", [*rows[:700], (rows[0][0], "odd")]),
        ("val", rows[700:730]),
        ("test", rows[730:]),
    ):
        write_csv(f"r/{split}.csv", of)
    new.main("r/{split}.csv")
    experiment = load_experiment("r")
    assert experiment.data.rows.validation == 30 and experiment.data.rows.test is None
    assert (
        experiment.data.labels["odd"] is None
        and "the file's own test rows" in capsys.readouterr().out
    )


def test_a_tab_separated_header_and_optional_keys_are_read_as_the_rows_are(written):
    Path("quoted.tsv").write_text(
        '"text"\t"label"\n' + "".join(f"{i} {words(i, 9)}\t{'ab'[i % 2]}\n" for i in range(90))
    )
    assert written("quoted.tsv").data.columns.text == "text"
    objects = [
        {"text": f"{i} {words(i, 9)}", "label": "ab"[i % 2]} | ({"note": "n"} if i == 0 else {})
        for i in range(90)
    ]
    Path("optional.jsonl").write_text("".join(json.dumps(of) + "\n" for of in objects))
    assert written("optional.jsonl").data.columns.text == "text"
    titled = [of | ({"title": f"Title {i}"} if i % 2 else {}) for i, of in enumerate(objects)]
    Path("titled.jsonl").write_text("".join(json.dumps(of) + "\n" for of in titled))
    experiment = written("titled.jsonl")
    assert experiment.data.columns.text == ["title", "text"] and experiment.data.bad_rows == "stop"
