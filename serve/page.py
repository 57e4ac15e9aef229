"""A page on 127.0.0.1 on which all trained methods answer side by side; a file of texts can be
dropped in to be labelled.

    python -m serve.page --experiment quick --port 8000

Nothing leaves the machine: no analytics, no font or script from elsewhere (the browser is told to
ask nobody else).
"""

import html
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_json
from letterhead.models.classifier import (
    CascadeClassifier,
    Classifier,
    load_classifier,
    model_folder,
)
from letterhead.models.prompt import keep_words, load_prompt_encoder
from letterhead.pipeline import HOSTED_LLM, METHODS, method_of
from letterhead.rows.tables import KINDS, PACKED
from letterhead.runs.stage import OFFLINE, run
from letterhead.serving.process import require_free
from letterhead.stats.verdict import as_times
from serve import predict
from serve.start import as_port

HOST = "127.0.0.1"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
)
SHOWN_CLASSES = 8
EXAMPLES = 4


def main(experiment: Experiment, port: str) -> None:
    os.environ |= OFFLINE | {"GRADIO_ANALYTICS_ENABLED": "False", "DO_NOT_TRACK": "1"}
    number = as_port(port)
    require_free(number)
    import uvicorn

    with TemporaryDirectory(prefix="letterhead-") as files:
        os.environ["GRADIO_TEMP_DIR"] = files  # what is dropped in goes when the page does
        application = build(experiment, Path(files))
        print(f"http://{HOST}:{port} (end with Ctrl-C)", flush=True)
        uvicorn.run(application, host=HOST, port=number, log_level="warning")


def trained_methods(experiment: Experiment) -> dict[str, str]:
    """Full name → title of the methods that the comparison holds and whose models are there, the
    best first.

    Raises
    ------
    LetterheadError : nothing was compared yet, or no model is there
    """
    comparison = read_json(experiment.results_folder / "comparison.json")
    if comparison is None:
        raise LetterheadError(
            f"{experiment.results_folder}: nothing is trained yet; run: make report "
            f"EXP={experiment.name}"
        )
    decided = read_json(experiment.results_folder / "decision.json") or {}
    ranked = sorted(comparison["methods"].items(), key=lambda item: -item[1]["f1_macro"])
    found = {}
    for name, entry in ranked:
        method = METHODS[entry["method"]]
        if (
            method.is_trained
            and method.loader
            and all(_answers_here(experiment, part) for part in parts_of(entry, name))
        ):
            best = ", to be shipped" if name == decided.get("ship") else ""
            found[name] = f"{entry['title']} (macro F1 {entry['f1_macro']:.3f}{best})"
    if not found:
        raise LetterheadError(
            f"{experiment.run_folder}: no model is there; run: make report EXP={experiment.name}"
        )
    return found


def parts_of(entry: dict, name: str) -> list[str]:
    """The methods that an entry of the comparison asks: itself, or a cascade's halves."""
    halves = entry.get("halves")
    return [halves["cheap"], halves["dear"]] if halves else [name]


def _answers_here(experiment: Experiment, name: str) -> bool:
    """Whether a method's model is on this machine: the page asks nobody else."""
    if not method_of(name).model:
        return method_of(name) is not HOSTED_LLM
    try:
        return model_folder(experiment, name).is_dir()
    except LetterheadError as missing:
        print(f"{missing}; left out")
        return False


@dataclass(frozen=True)
class Answer:
    """A method's answer to one text.

    Attributes
    ----------
    shares : label → probability
    milliseconds : that it took
    is_deferred : whether a cascade passed the text on; None of a method that is no cascade
    """

    shares: dict[str, float]
    milliseconds: float
    is_deferred: bool | None = None


def answer(experiment: Experiment, classifiers: dict[str, Classifier], text: str) -> list[Answer]:
    """Each method's answer to a text.

    Raises
    ------
    LetterheadError : there is no text
    """
    cut = keep_words(text, experiment.data.max_words).strip()
    if not cut:
        raise LetterheadError("the text is empty; type or paste one")
    answers = []
    for classify in classifiers.values():
        start = time.perf_counter()
        deferred = None
        if isinstance(classify, CascadeClassifier):
            (probabilities,), (deferred,) = classify.answer([cut])
        else:
            (probabilities,) = classify([cut])
        milliseconds = 1000 * (time.perf_counter() - start)
        shares = dict(zip(experiment.labels, map(float, probabilities), strict=True))
        answers.append(Answer(shares, milliseconds, None if deferred is None else bool(deferred)))
    return answers


def who_answered(methods: dict, prices: dict[str, float], name: str, answered: Answer) -> str:
    """Which half of a cascade answered, and the price of that over the cheapest method's, in
    Markdown; of another method the price.

    Parameters
    ----------
    methods : the comparison's
    prices : full name → price of a row, the decision's
    """
    asked, half = parts_of(methods[name], name), ""
    if answered.is_deferred is not None:
        asked = asked if answered.is_deferred else asked[:1]
        half = f", answered by {methods[asked[-1]]['title']}"
    cheapest = min(prices.values(), default=0)
    if not cheapest or not all(one in prices for one in asked):
        return half
    return f"{half}, price {as_times(sum(prices[one] for one in asked) / cheapest)}"


def prompt_of(experiment: Experiment, encoder, text: str) -> tuple[str, str]:
    """What the LLM reads, and the token ids that carry the answer, one option a line."""
    cut = keep_words(text, experiment.data.max_words).strip()
    lines = []
    for option, label, answer_ids in zip(
        encoder.options, experiment.labels, encoder.answers, strict=True
    ):
        spelled = answer_ids.ids[answer_ids.start : answer_ids.stop]
        same = "" if option == label else f" = {label}"
        lines.append(f"{option}{same}: {' '.join(map(str, spelled))}")
    lead = encoder.answers[0].ids[: encoder.answers[0].start]
    lines.append(f"before it: {' '.join(map(str, lead)) or 'nothing'}")
    return encoder.tokenizer.decode(encoder.encode(cut)), "\n".join(lines)


def put_together(experiment: Experiment) -> str:
    """How a text is made of several columns, for who types one."""
    columns = experiment.data.columns
    if columns.text == columns.parts[0]:
        return ""
    how = (
        f"as {columns.text}"
        if isinstance(columns.text, str)
        else f"{', '.join(columns.parts)}, each from a new line"
    )
    return f"; write it {how}"


def build(experiment: Experiment, files: Path):
    """The page as an ASGI application, all models loaded; files that it labels lie in the folder
    `files`."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*Gradio 6.0")
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    titles = trained_methods(experiment)
    methods = read_json(experiment.results_folder / "comparison.json")["methods"]
    prices = (read_json(experiment.results_folder / "decision.json") or {}).get("prices", {})
    classifiers = {name: load_classifier(experiment, name) for name in titles}
    answer(experiment, classifiers, "warm up")
    encoder = load_prompt_encoder(experiment)
    examples = [row["text"] for row in _examples(experiment)]

    def label(text: str) -> list:
        try:
            answers = answer(experiment, classifiers, text)
        except LetterheadError as error:
            raise gr.Error(str(error)) from None
        taken = [
            f"{title}: **{one.milliseconds:.0f} ms**{who_answered(methods, prices, name, one)}"
            for one, (name, title) in zip(answers, titles.items(), strict=True)
        ]
        shares = (one.shares for one in answers)
        return [*taken, *shares, *prompt_of(experiment, encoder, text)]

    def label_file(source: str | None, name: str) -> str:
        if source is None:
            raise gr.Error("drop a file first")
        target = files / f"{Path(source).stem}.labelled.csv"
        try:
            predict.main(experiment, source, str(target), name)
        except (
            LetterheadError
        ) as error:  # the page shows messages as HTML, and a header is somebody's text
            raise gr.Error(html.escape(str(error).replace(source, Path(source).name))) from None
        return str(target)

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    of_page = {
        "title": f"Letterhead: {experiment.name}",
        "theme": theme,
        "css": "footer {display: none !important}",
    }
    with gr.Blocks(**of_page, analytics_enabled=False) as page:
        gr.Markdown(f"# A letter or a head? {experiment.name}")
        text = gr.Textbox(
            lines=5,
            label=f"A text ({experiment.title}){put_together(experiment)}",
            placeholder="Type or paste a text",
        )
        button = gr.Button("Label it", variant="primary")
        named, bars = [], []
        for begin in range(0, len(titles), 3):
            with gr.Row():
                for title in list(titles.values())[begin : begin + 3]:
                    with gr.Column(min_width=240):
                        named.append(gr.Markdown(title))
                        bars.append(
                            gr.Label(
                                show_label=False,
                                num_top_classes=min(SHOWN_CLASSES, len(experiment.labels)),
                            )
                        )
        with gr.Accordion(
            "What the LLM reads, and the token ids that carry its answer", open=False
        ):
            read = gr.Textbox(label="prompt, control tokens included", lines=8, interactive=False)
            ids = gr.Textbox(
                label="option: token ids",
                lines=min(SHOWN_CLASSES, len(experiment.labels)) + 1,
                interactive=False,
            )
        if examples:
            gr.Examples([[example] for example in examples], inputs=text, label="test rows")
        with gr.Accordion("Label a file", open=False):
            parts = ", ".join(experiment.data.columns.parts)
            dropped = gr.File(
                label=f"{', '.join(KINDS)}; with the column {parts}",
                file_types=[*KINDS, PACKED],
                type="filepath",
            )
            method = gr.Dropdown(
                [(title, name) for name, title in titles.items()],
                value=next(iter(titles)),
                label="method",
            )
            labelled = gr.File(label="labelled")
            gr.Button("Label the file").click(label_file, [dropped, method], labelled)
        button.click(label, text, [*named, *bars, read, ids])
        text.submit(label, text, [*named, *bars, read, ids])

    application = FastAPI()
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @application.middleware("http")
    async def ask_nobody_else(request, call_next):
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    return gr.mount_gradio_app(application, page, path="/", allowed_paths=[str(files)])


def _examples(experiment: Experiment) -> list[dict]:
    from letterhead.runs import results

    return results.read_rows(experiment, "test")[:EXAMPLES]


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"port": "a free port"})
