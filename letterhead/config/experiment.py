"""An experiment: one YAML file, read with OmegaConf, checked with pydantic before any stage
begins."""

import difflib
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from yaml import YAMLError

from letterhead.config.data import Data
from letterhead.config.evaluation import LETTERS, Compare, Eval, Prompt
from letterhead.config.models import Decoder, Distill, Encoder, Endpoint, Grpo, Parts
from letterhead.config.section import Section
from letterhead.config.service import Bench, Serve
from letterhead.files import LetterheadError

ENGLISH, CHINESE = "en", "zh"
HAN, KANA = re.compile(r"[\u3400-\u9fff]"), re.compile(r"[\u3041-\u3096\u30a1-\u30fa]")


class Experiment(Section):
    """A validated experiment."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = Field(
        description="The name of the experiment's file. What it makes lies under data/NAME and "
        "runs/NAME."
    )
    title: str = Field(description="What a reader calls the experiment.")
    seed: int = Field(42, description="The seed of training.")
    seeds: list[int] = Field(
        [],
        description=(
            "Trains every method once for each seed. The first stands where one model is "
            "served, and"
            " takes the place of `seed`."
        ),
    )
    balance: Literal["none", "weights", "oversample"] = Field(
        "none",
        description=(
            "What brings up rare classes: weights in the loss, or rows that stand more than once. "
            "SFT's loss takes no weights; there both are rows. The loss that chooses steps and "
            "rates on validation rows counts every class alike then."
        ),
    )
    leave_out: list[str] = Field(
        [],
        description=(
            "Contenders that are left out, for time, of `setfit`, `bert`, `bert_all`, "
            "`linear_head`, `sft` (whose checkpoints are then not scored), `sft_options`, and the "
            "untrained LLM's three: `zero_shot_no_think`, `zero_shot_calibrated`, "
            "`zero_shot_think`."
        ),
    )
    data: Data
    prompt: Prompt = Field(default_factory=Prompt)
    decoder: Decoder = Field(default_factory=Decoder)
    encoder: Encoder = Field(default_factory=Encoder)
    eval: Eval = Field(default_factory=Eval)
    distill: Distill | None = None
    endpoint: Endpoint | None = None
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
        """This experiment, and for each further seed one that differs in its seed and its name
        alone."""
        further = [
            {"name": f"{self.name}.seed{seed}", "seed": seed, "seeds": []}
            for seed in self.seeds[1:]
        ]
        return [self, *(self.model_copy(update=keys) for keys in further)]

    @model_validator(mode="after")
    def _one_seed(self) -> "Experiment":
        if (seed := self.decoder.sft.arguments().get("seed", self.seed)) != self.seed:
            raise ValueError(
                f"seed is {self.seed}, but {self.decoder.sft.config} or its overrides say "
                f"{seed}; name one"
            )
        return self

    @model_validator(mode="after")
    def _known_classes(self) -> "Experiment":
        costs = self.compare.costs or {}
        named = [*costs, *(label for row in costs.values() for label in row)]
        named += [label for label in [self.compare.metric.partition(":")[2]] if label]
        for label in named:
            if label not in self.data.label_names:
                raise ValueError(
                    f"compare: {label!r} is no label; they are {', '.join(self.data.label_names)}"
                )
        return self

    @model_validator(mode="after")
    def _enough_letters(self) -> "Experiment":
        labels = self.data.label_names
        if self.prompt.options == "letters" and len(labels) > len(LETTERS):
            raise ValueError(
                f"prompt.options: {len(labels)} labels, but letters go to {len(LETTERS)}; set "
                f"prompt.options: names"
            )
        return self

    @model_validator(mode="after")
    def _thoughts_are_learnt(self) -> "Experiment":
        arguments = self.decoder.sft.arguments()
        if "distilled" in arguments["dataset"].split(",") and self.distill is None:
            raise ValueError(
                "decoder.sft: its dataset is a teacher's, `distilled`; add a section distill, "
                "or name sft_train"
            )
        if self.distill and arguments.get("enable_thinking") is False:
            raise ValueError(
                "distill: enable_thinking is false, and LLaMA-Factory would take the thoughts "
                "out; set it to true"
            )
        return self

    @model_validator(mode="after")
    def _only_sft_is_taught(self) -> "Experiment":
        if "sft" in self.leave_out and self.distill:
            raise ValueError("leave_out: sft is what the section distill teaches; take out one")
        return self

    @model_validator(mode="after")
    def _saves_by_steps(self) -> "Experiment":
        sft = self.decoder.sft
        if (sft.patience or sft.search) and sft.arguments().get("save_strategy") != "steps":
            raise ValueError(
                f"decoder.sft: patience and search look at validation rows at each save; "
                f"{sft.config} must say save_strategy: steps"
            )
        return self

    @property
    def labels(self) -> list[str]:
        return self.data.label_names

    @property
    def language(self) -> str:
        """That of the question, in which the report's first screen is written: Chinese or
        English."""
        asked = re.sub(r"\{.*?\}", "", self.prompt.template)
        letters = sum(map(str.isalpha, asked))
        is_chinese = 2 * len(HAN.findall(asked)) > letters and not KANA.search(asked)
        return CHINESE if is_chinese else ENGLISH

    @property
    def reading(self) -> dict[str, Any]:
        """What decides how a trained model reads a row, and what its classes are called."""
        of_rows = {
            "data.labels": self.labels,
            "data.columns.text": self.data.columns.text,
            "data.max_words": self.data.max_words,
        }
        of_heads = {
            f"{section}.head": head.model_dump(include={"max_length", "long_texts"})
            for section, head in (("encoder", self.encoder.head), ("decoder", self.decoder.head))
        }
        return of_rows | of_heads | {"prompt": self.prompt.model_dump(mode="json")}

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
        """All of LLaMA-Factory's arguments: its YAML, the overrides, and what the experiment
        decides."""
        return self.decoder.sft.arguments() | self.sft_decided()

    def sft_decided(self) -> dict[str, Any]:
        """LLaMA-Factory's arguments that the experiment decides: where its files lie, the seed, and
        with `decoder.sft.patience` how validation rows are read."""
        decided = {
            "dataset_dir": str(self.data_folder),
            "output_dir": str(self.sft_folder / "checkpoints"),
            "seed": self.seed,
        }
        if self.decoder.sft.patience:
            decided |= self.sft_validated() | {"lr_scheduler_type": "constant_with_warmup"}
        return decided

    def sft_validated(self) -> dict[str, Any]:
        """LLaMA-Factory's arguments by which it reads validation rows as often as it saves."""
        return {
            "eval_dataset": "sft_validation",
            "val_size": 0,
            "eval_strategy": "steps",
            "eval_steps": self.decoder.sft.arguments().get("save_steps", 500),
            "metric_for_best_model": "loss",
            "greater_is_better": False,
        }


def load_experiment(name: str, overrides: str = "") -> Experiment:
    """Read and check an experiment.

    Parameters
    ----------
    name : a name in experiments/, or the path of a YAML file
    overrides : `key=value` pairs in OmegaConf's dotted form, separated by spaces

    Raises
    ------
    LetterheadError : no such file, not YAML, an unknown key, a value that does not fit; names file,
        key and mend
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("experiments") / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in Path("experiments").glob("*.yaml"))
        near = difflib.get_close_matches(path.stem, known, 1)
        mend = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise LetterheadError(f"{path}: no such experiment; {mend} (or write that file)")
    try:
        pairs = shlex.split(overrides)
        if wrong := [pair for pair in pairs if "=" not in pair]:
            raise LetterheadError(
                f"SET: {wrong[0]!r} is not key=value; write for example SET='data.rows.test=100'"
            )
        values = OmegaConf.to_container(
            OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(pairs))
        )
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        raise LetterheadError(
            f"{path}: cannot be read as YAML with SET={overrides!r}: {error}"
        ) from None
    if not isinstance(values, dict):
        raise LetterheadError(f"{path}: not a mapping of keys; begin with title: and data:")
    try:
        return Experiment.model_validate({"name": path.stem} | values)
    except ValidationError as error:
        raise LetterheadError(
            f"{path}{' with SET' if overrides else ''}: " + explain(error, Experiment)
        ) from None


def explain(error: ValidationError, root: type[Section]) -> str:
    """What does not fit, key by key, with the mend, in place of pydantic's own words."""
    lines = []
    for problem in error.errors():
        if problem["loc"][-2:] == ("model", "str"):
            continue  # a model may be text or parts, and these are parts
        key = ".".join(str(part) for part in problem["loc"] if part != Parts.__name__)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            section = root
            for part in problem["loc"][:-1]:
                if field := section.model_fields.get(part):
                    kinds = [field.annotation, *get_args(field.annotation)]
                    section = next(
                        kind
                        for kind in kinds
                        if isinstance(kind, type) and issubclass(kind, Section)
                    )
            near = difflib.get_close_matches(
                str(problem["loc"][-1]), section.model_fields, n=1, cutoff=0.5
            )
            mend = (
                f"did you mean {near[0]}?" if near else "known: " + ", ".join(section.model_fields)
            )
            message = f"unknown key; {mend}"
        elif problem["type"] == "missing":
            message = "missing; add it"
        lines.append(f"{key}: {message}" if key else message)
    return "\n  ".join(dict.fromkeys(lines))
