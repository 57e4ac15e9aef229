"""The stages and the methods: the only lists of either, from which the rest of the house is
derived.

A stage makes files under `runs/EXPERIMENT/STAGE` and leaves a record of what it made them from.
`inputs` computes that from the experiment, purely: nothing is run, printed or deleted. A method is
a classifier that the comparison holds.

To add a stage, add an entry, its module with a `main(experiment)`, and a target to the Makefile (a
test holds the two together). To add a method, add an entry with the stage that leaves its results
and the function that loads it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

from letterhead.config.experiment import Experiment
from letterhead.config.models import Head
from letterhead.files import LetterheadError, model_identity, read_json, sha256_file, sha256_json

# Counted up when a result holds other figures, or a checkpoint is chosen otherwise: results of
# before are computed anew.
FIGURES = 3
# Counted up when written answers are read otherwise (letterhead.models.answers).
READING = 2
# The rows that the methods share, and all of train
SHARED, ALL = "decoder_train", "train"
SPLIT_FILES = ("test.jsonl", "validation.jsonl")
# LLaMA-Factory's keys that say where files lie, which decides nothing about what is learnt
PLACES = ("dataset_dir", "output_dir")
# What decides how a row becomes a prompt
PROMPT_KEYS = (
    "prompt",
    "data.labels",
    "decoder.sft:template,cutoff_len,enable_thinking,default_system",
)
SCORING_KEYS = (
    *PROMPT_KEYS,
    "eval.score",
    "eval.option_order",
    "eval.examples",
    "decoder.dtype",
    "seed",
)
# With so many validation rows, so many cascades
MOST_CASCADES = ((300, 3), (100, 2))
THINKING_KEYS = ("eval.thinking.rows", "eval.thinking.tokens")


def always(experiment: Experiment) -> bool:
    return True


def read_card(experiment: Experiment) -> dict[str, Any] | None:
    """The data card; None where there is none, or one of an earlier version."""
    card = read_json(experiment.data_folder / "data_card.json")
    return card if card and "sft_rows" in card.get("shared", {}) else None


def shared_rows(experiment: Experiment) -> int:
    """How many rows the methods share.

    Raises
    ------
    LetterheadError : no rows were made yet
    """
    card = read_card(experiment)
    if card is None:
        path = experiment.data_folder / "data_card.json"
        raise LetterheadError(f"{path}: not made yet; run: make data EXP={experiment.name}")
    return card["shared"]["rows"]


def has_more_rows(experiment: Experiment) -> bool:
    """Whether train has more rows than the methods share (decoder.train_rows).

    Raises
    ------
    LetterheadError : no rows were made yet
    """
    return shared_rows(experiment) < read_card(experiment)["rows"]["train"]


def has_few_rows(experiment: Experiment) -> bool:
    """Whether the shared rows are few enough for SetFit (encoder.setfit.rows_per_class).

    Raises
    ------
    LetterheadError : no rows were made yet
    """
    most = experiment.encoder.setfit.rows_per_class
    return bool(most) and shared_rows(experiment) <= most * len(experiment.labels)


def has_teacher(experiment: Experiment) -> bool:
    return experiment.distill is not None


def has_endpoint(experiment: Experiment) -> bool:
    return experiment.endpoint is not None


def learns_thoughts(experiment: Experiment) -> bool:
    return has_teacher(experiment) and "distilled" in experiment.sft_arguments()["dataset"].split(
        ","
    )


def reads_validation(experiment: Experiment) -> bool:
    return bool(experiment.decoder.sft.patience or experiment.decoder.sft.search)


def most_cascades(experiment: Experiment) -> int:
    """How many cascades validation rows may choose: each more is one more that chance may favour.

    Raises
    ------
    LetterheadError : no rows were made yet
    """
    shared_rows(experiment)
    rows = read_card(experiment)["rows"]["validation"]
    return next((most for least, most in MOST_CASCADES if rows >= least), 0)


def can_cascade(experiment: Experiment) -> bool:
    """Whether validation rows are enough to choose a cascade.

    Raises
    ------
    LetterheadError : no rows were made yet
    """
    return most_cascades(experiment) > 0


def trains_on_options(experiment: Experiment) -> bool:
    return experiment.decoder.sft_options is not None


def never(experiment: Experiment) -> bool:
    """Of what only a study makes."""
    return False


@dataclass(frozen=True)
class Need:
    """What a stage reads of another.

    files : names of the files that it reads, or all that the other made
    record : the other's figures (seconds, memory) decide too
    when : whether an experiment makes it read them
    """

    stage: str
    files: tuple[str, ...] = ()
    record: bool = False
    when: Callable[[Experiment], bool] = always


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Parameters
    ----------
    name : of its folder under runs/EXPERIMENT
    does : what it does, in a few words
    module : what `python -m` runs, with `argument` before --experiment
    needs : what it reads of other stages
    keys : the experiment's keys that decide its result, as `section.key`; `section:a,b` stands for
        these keys of it
    models : the sections whose models decide
    version : counted up when its code makes another result
    code : modules whose source decides, of a stage that costs seconds
    more : MODULE:FUNCTION of what else decides
    retrained : made anew by each further seed
    target : the Makefile's target, where it has another name
    when : whether an experiment has it
    """

    name: str
    does: str
    module: str
    argument: str = ""
    needs: tuple[Need, ...] = ()
    keys: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    version: int = 1
    code: tuple[str, ...] = ()
    more: str = ""
    retrained: bool = False
    target: str = ""
    when: Callable[[Experiment], bool] = always

    @property
    def make_target(self) -> str:
        return self.target or self.name

    def is_in(self, experiment: Experiment) -> bool:
        """Whether a report of the experiment needs it.

        Raises
        ------
        LetterheadError : that hangs on rows, and none were made yet
        """
        return self.name not in stages_left_out(experiment) and self.when(experiment)

    def main(self) -> Callable[..., None]:
        """The function that makes it."""
        return import_module(self.module).main


def _head_stage(
    name: str, does: str, method: str, model: str, key: str, rows: str = SHARED, **more: Any
) -> Stage:
    files = (f"{rows}.jsonl", *SPLIT_FILES)
    keys = (f"{model}.{key}", "data.labels", "decoder.dtype", "balance", "seed")
    keys += more.pop("keys", ())
    needs = (Need("data", files),)
    return Stage(
        name,
        does,
        "train.heads",
        method,
        needs,
        keys,
        (model,),
        version=FIGURES,
        retrained=True,
        **more,
    )


def _fitted_stages(
    name: str, does: str, code: str, keys: tuple[str, ...] = (), **more: Any
) -> list[Stage]:
    """The stages of a method that is fitted in seconds: on the shared rows, and on all of train."""
    keys = ("data.labels", "balance", "seed", *keys)
    more |= {"version": FIGURES}
    more["code"] = (code, "letterhead.models.fitted", "letterhead.models.prompt")
    stages = []
    for argument, rows, words in (
        (name, SHARED, does),
        (f"{name}_all", ALL, "the same on all of train"),
    ):
        needs = (Need("data", (f"{rows}.jsonl", *SPLIT_FILES)),)
        if rows == ALL:
            more |= {"target": name, "when": has_more_rows}
        stage_name = argument.replace("_", "-")
        stages.append(Stage(stage_name, words, "train.fitted", argument, needs, keys, **more))
    return stages


_STAGES = (
    DATA := Stage(
        "data",
        "fetch models and rows, draw the splits",
        "prep.data",
        keys=(
            "title",
            "data",
            "prompt",
            "balance",
            "decoder.train_rows",
            "decoder.license",
            "encoder.license",
            "decoder.sft:template,cutoff_len,enable_thinking,dataset",
        ),
        models=("decoder", "encoder"),
        version=7,
        more="letterhead.rows.sources:files_of",
    ),
    DISTILL := Stage(
        "distill",
        "have a teacher write its thinking",
        "train.distill",
        needs=(Need("data", (f"{SHARED}.jsonl",)),),
        keys=("distill:model,endpoint,rows,tries,tokens,temperature,of", *PROMPT_KEYS, "seed"),
        more="train.distill:taken_over",
        when=has_teacher,
        version=READING,
    ),
    SFT_TRAINING := Stage(
        "sft",
        "teach the decoder to answer with an option",
        "train.sft",
        needs=(
            Need("data", ("sft_train.jsonl",)),
            Need("data", ("sft_validation.jsonl",), when=reads_validation),
            Need("distill", when=learns_thoughts),
        ),
        keys=("decoder.sft", "decoder.sft.patience", "decoder.sft.search", "decoder.dtype"),
        models=("decoder",),
        retrained=True,
    ),
    EVAL_CKPTS := Stage(
        "eval-ckpts",
        "score every SFT checkpoint",
        "eval.checkpoints",
        needs=(Need("sft"), Need("data", (f"{SHARED}.jsonl", *SPLIT_FILES))),
        keys=(*SCORING_KEYS, "eval.untrained", "balance"),
        version=FIGURES,
        retrained=True,
    ),
    SFT_THINKING := Stage(
        "sft-think",
        "let the chosen SFT checkpoint think",
        "eval.sft_think",
        needs=(Need("eval-ckpts"),),
        keys=(*THINKING_KEYS, *PROMPT_KEYS, "seed"),
        version=10 * FIGURES + READING,
        retrained=True,
        when=has_teacher,
    ),
    ZERO_SHOT := Stage(
        "zero-shot",
        "ask the untrained decoder",
        "eval.zero_shot",
        needs=(Need("data", (f"{SHARED}.jsonl", *SPLIT_FILES)),),
        keys=(*SCORING_KEYS, *THINKING_KEYS),
        models=("decoder",),
        version=10 * FIGURES + READING,
    ),
    HOSTED := Stage(
        "endpoint",
        "ask a hosted LLM",
        "eval.endpoint",
        needs=(Need("data", (f"{SHARED}.jsonl", *SPLIT_FILES)),),
        keys=(
            "endpoint:url,model,examples,choose,rows,tokens,logprobs",
            "endpoint:price_of_prompts,price_of_replies",
            "encoder.prefix",
            "encoder.head:max_length",
            *PROMPT_KEYS,
            "seed",
        ),
        models=("decoder", "encoder"),
        version=10 * FIGURES + READING,
        when=has_endpoint,
    ),
    *_fitted_stages("tfidf", "fit TF-IDF with logistic regression", "letterhead.models.tfidf"),
    *_fitted_stages(
        "embedding",
        "fit logistic regression on frozen embeddings",
        "letterhead.models.embeddings",
        keys=("encoder.prefix", "encoder.head:max_length"),
        models=("encoder",),
    ),
    SETFIT_TRAINING := Stage(
        "setfit",
        "fine-tune the encoder by contrast of pairs",
        "train.fitted",
        "setfit",
        (Need("data", (f"{SHARED}.jsonl", *SPLIT_FILES)),),
        ("data.labels", "balance", "seed", "encoder.setfit", "encoder.prefix")
        + ("encoder.head:max_length",),
        ("encoder",),
        version=FIGURES,
        retrained=True,
        when=has_few_rows,
    ),
    _head_stage("bert", "fine-tune BERT", "bert", "encoder", "head"),
    _head_stage(
        "bert-all",
        "fine-tune BERT on all of train",
        "bert_all",
        "encoder",
        "head",
        ALL,
        when=has_more_rows,
    ),
    _head_stage(
        "linear-head", "train a linear head with the decoder", "linear_head", "decoder", "head"
    ),
    _head_stage(
        "sft-options",
        "train the decoder on the options alone",
        "sft_options",
        "decoder",
        "sft_options",
        keys=PROMPT_KEYS,
        when=trains_on_options,
    ),
    CASCADES := Stage(
        "cascade",
        "choose cascades of two methods on validation rows",
        "eval.cascade",
        keys=("data.labels", "seeds", "endpoint:price_of_error"),
        code=(
            "eval.cascade",
            "letterhead.stats.cascade",
            "letterhead.stats.metrics",
            "letterhead.runs.contenders",
            "letterhead.pipeline",
        ),
        more="letterhead.pipeline:members_made",
        version=FIGURES,
        when=can_cascade,
    ),
    COMPARE := Stage(
        "compare",
        "compare the methods, pair by pair",
        "eval.compare",
        keys=("data.labels", "data.near_duplicates", "balance", "seed", "seeds"),
        code=(
            "eval.compare",
            "letterhead.stats.metrics",
            "letterhead.stats.verdict",
            "letterhead.runs.contenders",
            "letterhead.runs.results",
            "letterhead.pipeline",
        ),
        more="letterhead.pipeline:records_compared",
    ),
    DECIDE := Stage(
        "decide",
        "decide which to ship",
        "eval.decide",
        needs=(Need("compare"),),
        keys=("compare", "data.labels", "prompt.template", "bench.price_per_hour"),
        code=(
            "eval.decide",
            "letterhead.runs.contenders",
            "letterhead.stats.cascade",
            "letterhead.stats.decision",
            "letterhead.stats.verdict",
            "letterhead.stats.phrases",
            "letterhead.stats.metrics",
        ),
        more="letterhead.runs.results:read_prices",
    ),
    REPORT := Stage(
        "report",
        "write the report",
        "report.build",
        needs=(Need("decide"),),
        more="report.build:shown",
    ),
    GRPO_TRAINING := Stage(
        "grpo",
        "train by reward from the chosen SFT checkpoint on",
        "train.grpo",
        needs=(Need("eval-ckpts"), Need("data", (f"{SHARED}.jsonl",))),
        keys=("grpo", "decoder.dtype", "seed"),
        when=never,
        version=READING,
    ),
    GRPO_SCORING := Stage(
        "eval-grpo",
        "score what GRPO made",
        "eval.grpo",
        needs=(Need("grpo"), Need("data", (f"{SHARED}.jsonl", *SPLIT_FILES))),
        keys=(*SCORING_KEYS, *THINKING_KEYS),
        version=10 * FIGURES + READING,
        target="grpo",
        when=never,
    ),
    AUDIT := Stage(
        "audit",
        "find labels that look wrong",
        "report.audit",
        needs=(Need("data", (f"{ALL}.jsonl", *SPLIT_FILES, "data_card.json")),),
        keys=("data.labels", "balance", "seed", "encoder.prefix", "encoder.head:max_length"),
        models=("encoder",),
        code=("report.audit", "letterhead.stats.label_errors", "letterhead.models.embeddings")
        + ("letterhead.models.fitted",),
        when=never,
    ),
    RANK := Stage(
        "rank",
        "rank training rows by the untrained decoder",
        "eval.rank",
        needs=(Need("data", (f"{ALL}.jsonl", f"{SHARED}.jsonl")),),
        keys=SCORING_KEYS,
        models=("decoder",),
        when=never,
    ),
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _STAGES}


@dataclass(frozen=True)
class Method:
    """A classifier that the comparison holds.

    Parameters
    ----------
    title, short : what a reader calls it, and what the bench does
    stage : the name of the stage that leaves its results
    trained_by : that of the stage that trains it, None for one that is untrained
    rows : the rows that it is trained on, SHARED or ALL
    model, settings : the section of its model, and the key in it that says how it is trained
    loader : MODULE:FUNCTION that loads it, given experiment and full name, as a function from texts
        to probabilities; none for one that writes freely
    fitter : MODULE:FUNCTION that fits it in seconds, given experiment and rows, wherever it is
        needed
    reads_prompt : it reads the prompt, not the text alone
    has_steps : its checkpoints are scored and kept
    thinks : it writes freely
    step_0 : the method as which its model before training stands
    is_saved : its stage leaves it as a model of its own
    runner : vLLM's way of serving it, for decoders
    bench : what is measured in service: name of the row, engine, and how an answer is got out of it
    priced_as : rows of the bench whose price is its own, too
    when : whether an experiment compares it
    """

    name: str
    title: str
    stage: str
    trained_by: str | None = None
    rows: str | None = None
    model: str | None = None
    settings: str | None = None
    loader: str = ""
    fitter: str = ""
    is_saved: bool = False
    reads_prompt: bool = False
    has_steps: bool = False
    thinks: bool = False
    step_0: str | None = None
    runner: str = ""
    short: str = ""
    bench: tuple[tuple[str, str, str], ...] = ()
    priced_as: tuple[str, ...] = ()
    when: Callable[[Experiment], bool] = always

    def is_in(self, experiment: Experiment) -> bool:
        """Whether an experiment compares it.

        Raises
        ------
        LetterheadError : that hangs on rows, and none were made yet
        """
        return self not in left_out(experiment) and self.when(experiment)

    @property
    def is_trained(self) -> bool:
        return self.trained_by is not None

    @property
    def may_be_left_out(self) -> bool:
        """Whether it may take minutes or hours: it is trained, or an LLM is asked."""
        is_dear = self.has_steps or self.is_saved or self.stage == ZERO_SHOT.name
        return is_dear and self.when is not never

    @property
    def family(self) -> str:
        """What it shares with the method that differs from it in its training rows alone."""
        return self.name.removesuffix("_all")

    @property
    def target(self) -> str:
        """The Makefile's target that makes it."""
        return STAGES[self.stage].make_target

    def section(self, experiment: Experiment) -> Any:
        """The experiment's section of its model."""
        return getattr(experiment, self.model)

    def head(self, experiment: Experiment) -> Head | None:
        """How a head is trained, None where the experiment leaves it out."""
        return getattr(self.section(experiment), self.settings)

    def checkpoints(self, experiment: Experiment) -> Path:
        """Where its checkpoints lie."""
        return experiment.run_folder / self.trained_by / "checkpoints"

    def saved(self, experiment: Experiment) -> Path:
        """Where its stage leaves it as a model of its own."""
        return experiment.run_folder / self.trained_by / "model"

    def load(self) -> Callable[..., Any]:
        """The function that loads it."""
        return resolve(self.loader)

    def fit(self) -> Callable[..., Any]:
        """The function that fits it."""
        return resolve(self.fitter)


CLASSIFIER = "letterhead.models.classifier"
_HEAD = {
    "loader": f"{CLASSIFIER}:load_head_method",
    "has_steps": True,
    "settings": "head",
}
_FITTED = {"loader": f"{CLASSIFIER}:load_fitted_method"}
_TFIDF = {"fitter": "letterhead.models.tfidf:fit", **_FITTED}
_EMBEDDING = {"fitter": "letterhead.models.embeddings:fit", "model": "encoder", **_FITTED}
_LETTERS = {"model": "decoder", "loader": f"{CLASSIFIER}:load_options_method", "reads_prompt": True}
# Rows of the bench that are no method of their own: SFT as a classifier, and the linear head on
# that one's prompts
FOLDED, HEAD_ON_PROMPT = "sft_folded", "linear_head_on_prompt"
_METHODS = (
    ZERO_SHOT_LETTERS := Method(
        "zero_shot_no_think",
        "LLM zero-shot, option perplexity",
        "zero-shot",
        priced_as=("sft", FOLDED),
        **_LETTERS,
    ),
    ZERO_SHOT_CALIBRATED := Method(
        "zero_shot_calibrated",
        "LLM zero-shot, contextual calibration",
        "zero-shot",
        priced_as=("sft", FOLDED),
    ),
    ZERO_SHOT_THINKING := Method(
        "zero_shot_think", "LLM zero-shot, thinking", "zero-shot", thinks=True
    ),
    HOSTED_LLM := Method(
        "endpoint",
        "Hosted LLM",
        HOSTED.name,
        loader="letterhead.serving.hosted:load_hosted_method",
        when=has_endpoint,
    ),
    TFIDF := Method(
        "tfidf",
        "TF-IDF + logistic regression",
        "tfidf",
        "tfidf",
        SHARED,
        short="TF-IDF",
        bench=(("tfidf", "sklearn", "head"),),
        **_TFIDF,
    ),
    TFIDF_ALL := Method(
        "tfidf_all",
        "TF-IDF, all rows",
        "tfidf-all",
        "tfidf-all",
        ALL,
        priced_as=("tfidf",),
        when=has_more_rows,
        **_TFIDF,
    ),
    EMBEDDING := Method(
        "embedding",
        "Frozen embeddings + logistic regression",
        "embedding",
        "embedding",
        SHARED,
        short="embedding",
        bench=(
            ("embedding", "st", "head"),
            ("embedding", "onnx", "head"),
            ("embedding", "onnx_int8", "head"),
        ),
        **_EMBEDDING,
    ),
    EMBEDDING_ALL := Method(
        "embedding_all",
        "Frozen embeddings, all rows",
        "embedding-all",
        "embedding-all",
        ALL,
        priced_as=("embedding",),
        when=has_more_rows,
        **_EMBEDDING,
    ),
    SETFIT := Method(
        "setfit",
        "SetFit",
        SETFIT_TRAINING.name,
        SETFIT_TRAINING.name,
        SHARED,
        "encoder",
        loader=f"{CLASSIFIER}:load_saved_method",
        fitter="letterhead.models.setfit:fit",
        is_saved=True,
        priced_as=("embedding",),
        when=has_few_rows,
    ),
    BERT := Method(
        "bert",
        "BERT",
        "bert",
        "bert",
        SHARED,
        "encoder",
        short="BERT",
        bench=(
            ("bert", "hf", "head"),
            ("bert", "onnx", "head"),
            ("bert", "onnx_int8", "head"),
            ("bert", "vllm", "head"),
        ),
        **_HEAD,
    ),
    BERT_ALL := Method(
        "bert_all",
        "BERT, all rows",
        "bert-all",
        "bert-all",
        ALL,
        "encoder",
        priced_as=("bert",),
        when=has_more_rows,
        **_HEAD,
    ),
    LINEAR_HEAD := Method(
        "linear_head",
        "LLM, linear head",
        "linear-head",
        "linear-head",
        SHARED,
        "decoder",
        short="linear head",
        bench=(
            ("linear_head", "hf", "head"),
            ("linear_head", "vllm", "head"),
            (HEAD_ON_PROMPT, "vllm", "head"),
        ),
        runner="pooling",
        **_HEAD,
    ),
    SFT := Method(
        "sft",
        "LLM, SFT (answers with an option)",
        "eval-ckpts",
        "sft",
        SHARED,
        has_steps=True,
        step_0="zero_shot_no_think",
        runner="generate",
        short="SFT",
        bench=(
            ("sft", "hf", "generate"),
            ("sft", "hf", "forward"),
            (FOLDED, "vllm", "head"),
            ("sft", "vllm", "one_token"),
            ("sft", "vllm", "generate"),
        ),
        **_LETTERS,
    ),
    SFT_THINK := Method(
        "sft_think", "LLM, SFT, thinking", "sft-think", "sft", SHARED, thinks=True, when=has_teacher
    ),
    GRPO := Method("grpo", "LLM, SFT and GRPO", "eval-grpo", "grpo", SHARED, when=never),
    GRPO_THINK := Method(
        "grpo_think",
        "LLM, SFT and GRPO, thinking",
        "eval-grpo",
        "grpo",
        SHARED,
        thinks=True,
        when=never,
    ),
    SFT_OPTIONS := Method(
        "sft_options",
        "LLM, SFT on the options alone",
        "sft-options",
        "sft-options",
        SHARED,
        "decoder",
        reads_prompt=True,
        runner="pooling",
        priced_as=(FOLDED,),
        when=trains_on_options,
        **_HEAD | {"settings": "sft_options"},
    ),
    CASCADE := Method(
        "cascade",
        "Cascade",
        CASCADES.name,
        CASCADES.name,
        loader=f"{CLASSIFIER}:load_cascade_method",
        short="cascade",
        bench=(("cascade", "two", "head"),),
        when=can_cascade,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
# What a reader calls the bench's rows that are no method of their own
SHORT_TITLES = {HEAD_ON_PROMPT: "linear head on the prompt", FOLDED: "SFT folded into a head"}


def method_of(name: str) -> Method:
    """The method of a full name: METHOD, METHOD@STEP, or of a cascade METHOD:DEAR.

    Raises
    ------
    LetterheadError : there is none
    """
    if (method := find_method(name)) is None:
        raise LetterheadError(f"{name}: no such method; choose one of {', '.join(METHODS)}")
    return method


def find_method(name: str) -> Method | None:
    """The method of a full name, or None."""
    return METHODS.get(name.partition("@")[0].partition(":")[0])


def compared_methods(experiment: Experiment) -> list[Method]:
    """The methods that an experiment compares, in their order."""
    return [method for method in METHODS.values() if method.is_in(experiment)]


def left_out(experiment: Experiment) -> list[Method]:
    """The methods that an experiment leaves out.

    Raises
    ------
    LetterheadError : no such method, or one that takes seconds
    """
    known = {name: method for name, method in METHODS.items() if method.may_be_left_out}
    for name in experiment.leave_out:
        if name not in known:
            raise LetterheadError(
                f"leave_out: {name!r} can't be left out; choose of {', '.join(known)}"
            )
    return [known[name] for name in experiment.leave_out]


def stages_left_out(experiment: Experiment) -> set[str]:
    """The names of the stages that score or train a method that is left out."""
    methods = left_out(experiment)
    kept = {method.stage for method in METHODS.values() if method not in methods}
    trained_by = {method.trained_by for method in methods if method.is_trained}
    return {method.stage for method in methods} - kept | trained_by


def cascade_members(experiment: Experiment) -> list[Method]:
    """The methods that a cascade may be made of: those that give probabilities."""
    methods = compared_methods(experiment)
    return [method for method in methods if method.loader and method is not CASCADE]


def cascades_file(experiment: Experiment) -> Path:
    """Where the cascades that validation rows chose stand: name → one a training."""
    return experiment.results_folder / "cascades.json"


def arguments_of(module: str) -> list[str]:
    """What a module that makes several stages may be told to make."""
    return [stage.argument for stage in STAGES.values() if stage.module == module]


def stages_of(experiment: Experiment) -> list[Stage]:
    """The stages that a report of the experiment is made of, in their order."""
    return [stage for stage in STAGES.values() if stage.is_in(experiment)]


def stage_needs(stage: Stage, experiment: Experiment) -> list[str]:
    """The stages whose files a stage reads."""
    if stage is COMPARE:
        return sorted(stages_compared(experiment), key=list(STAGES).index)
    if stage is CASCADES:
        return sorted(stages_of_members(experiment), key=list(STAGES).index)
    return [need.stage for need in stage.needs if need.when(experiment)]


def stages_compared(experiment: Experiment) -> set[str]:
    """The names of the stages that train and score the compared methods."""
    methods = compared_methods(experiment)
    return {name for method in methods for name in (method.stage, method.trained_by) if name}


def stages_of_members(experiment: Experiment) -> set[str]:
    """The names of the stages that score what cascades are made of."""
    return {method.stage for method in cascade_members(experiment)}


def inputs(stage: Stage, experiment: Experiment) -> dict[str, Any]:
    """All that a stage's result hangs on: keys, models, files of other stages by their sha256, and
    its code.

    Raises
    ------
    LetterheadError : a stage that it reads has not been made
    """
    files: dict[str, Any] = {}
    for need in stage.needs:
        if need.when(experiment):
            files[need.stage] = files.get(need.stage, {}) | files_read(need, experiment)
    return {
        "version": stage.version,
        "keys": {key: value_of(experiment, key) for key in stage.keys},
        "models": {
            section: model_identity(getattr(experiment, section).folder) for section in stage.models
        },
        "files": files,
        "code": {module: sha256_file(source_of(module)) for module in stage.code},
        "more": resolve(stage.more)(experiment) if stage.more else None,
    }


def inputs_sha256(stage: Stage, experiment: Experiment) -> str:
    """The hash of a stage's inputs."""
    return sha256_json(inputs(stage, experiment))


def value_of(experiment: Experiment, key: str) -> Any:
    """The value of a key of `Stage.keys`, as JSON holds it."""
    path, _, names = key.partition(":")
    if path == "data.labels":
        return experiment.labels
    if path == "decoder.sft":
        value = {
            name: each for name, each in experiment.sft_arguments().items() if name not in PLACES
        }
    else:
        value = experiment.model_dump(mode="json")
        for part in path.split("."):
            value = None if value is None else value[part]
    return {name: (value or {}).get(name) for name in names.split(",")} if names else value


def record_of(stage: str, experiment: Experiment) -> dict[str, Any]:
    """What a finished stage left.

    Raises
    ------
    LetterheadError : it has not been made, or is left out
    """
    folder = experiment.run_folder / stage
    if stage in stages_left_out(experiment):  # what an earlier run left may be of other rows
        raise LetterheadError(
            f"{stage}: {experiment.name} leaves it out; edit leave_out, or say SET='leave_out=[]'"
        )
    record = read_json(folder / "stage.json")
    if record is None:
        raise LetterheadError(
            f"{folder}: not made yet; run: make {STAGES[stage].make_target} EXP={experiment.name}"
        )
    return record


def outputs(stage: Stage, experiment: Experiment) -> dict[str, str]:
    """The sha256 of each file that a finished stage made, by path.

    Raises
    ------
    LetterheadError : it has not been made
    """
    return {
        path: output["sha256"]
        for path, output in record_of(stage.name, experiment)["outputs"].items()
    }


def files_read(need: Need, experiment: Experiment) -> Any:
    """The sha256 of the files that a stage reads of another, by path; or all of the other's
    record."""
    if need.record:
        return record_of(need.stage, experiment)
    files = outputs(STAGES[need.stage], experiment)
    return {
        path: sha256
        for path, sha256 in files.items()
        if not need.files or Path(path).name in need.files
    }


def members_made(experiment: Experiment) -> list[dict[str, Any]]:
    """The results that cascades are made of: those of the experiment, then of each further seed
    those that it makes anew."""
    names = sorted(stages_of_members(experiment))
    again = [name for name in names if STAGES[name].retrained]
    first = {name: outputs(STAGES[name], experiment) for name in names}
    return [first] + [
        {name: outputs(STAGES[name], one) for name in again} for one in experiment.trainings()[1:]
    ]


def records_compared(experiment: Experiment) -> dict[str, Any]:
    """The records of the stages that the comparison reads, and of each further seed those that it
    makes anew."""
    names = sorted(stages_compared(experiment))
    first = {name: record_of(name, experiment) for name in names}
    again = [name for name in names if STAGES[name].retrained]
    further = [
        {name: outputs(STAGES[name], one) for name in again} for one in experiment.trainings()[1:]
    ]
    return {"first": first, "further": further}


def source_of(module: str) -> Path:
    """The file of a module."""
    return Path(util.find_spec(module).origin)


def resolve(name: str) -> Any:
    """What MODULE:NAME stands for."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
