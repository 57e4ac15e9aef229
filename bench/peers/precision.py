"""Which predictions bfloat16 changes: option scores against float32, with the last projection in
bfloat16 and in float32.

    python -m bench.peers.precision --experiment quick

On the newest SFT checkpoint (step 0 if there is none). A processor without bfloat16 takes minutes a
row batch for it, so there its products are made in float32 of bfloat16 operands and rounded, which
is what a GPU computes.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from letterhead.config.experiment import Experiment
from letterhead.files import write_json
from letterhead.models import checkpoints
from letterhead.models.precision import Float32Linear
from letterhead.models.prompt import load_prompt_encoder
from letterhead.models.scoring import load_decoder, score_options
from letterhead.runs import results
from letterhead.runs.devices import machine
from letterhead.runs.stage import run


class Rounded(Float32Linear):
    """A float32 product of bfloat16 operands, rounded to bfloat16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input.float(), self.weight, self.bias).to(torch.bfloat16)


def main(experiment: Experiment) -> None:
    whole = checkpoints.whole_checkpoints(Path(experiment.sft_arguments()["output_dir"]))
    folder = whole[-1] if whole else experiment.decoder.folder
    encoder, with_end = load_prompt_encoder(experiment), experiment.prompt.options == "names"
    rows = [
        row for split in (*results.SPLITS, "train") for row in results.read_rows(experiment, split)
    ]
    prompts = [encoder.encode(row["text"]) for row in rows[: experiment.bench.scoring_rows]]

    def score(model, title: str) -> np.ndarray:
        budget, how = experiment.eval.batch_tokens, experiment.eval.score
        return score_options(model, prompts, encoder.answers, with_end, budget, title=title).score(
            how
        )

    exact = score(load_decoder(folder, "float32"), "float32")
    plain = as_it_comes(folder)
    scores = {"bfloat16": score(plain, "bfloat16")}
    del plain
    scores["bfloat16, last projection float32"] = score(
        load_rounded(folder), "last projection float32"
    )
    record = {"checkpoint": str(folder), "rows": len(prompts), "machine": machine(), "scores": {}}
    for title, found in scores.items():
        differ = np.flatnonzero(found.argmax(1) != exact.argmax(1))
        record["scores"][title] = {
            "differ": len(differ),
            "margins": sorted(round(float(np.ptp(np.sort(exact[i])[-2:])), 4) for i in differ),
            "ties": int(sum(np.sort(row)[-1] == np.sort(row)[-2] for row in found)),
        }
        print(f"{title}: {record['scores'][title]} of {len(prompts)} rows")
    write_json(experiment.results_folder / "bench_precision.json", record)


def as_it_comes(folder: Path):
    """The model in bfloat16 throughout, its last projection too."""
    model = rounded(
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True
        ).eval()
    )
    return model.to("cuda") if torch.cuda.is_available() else model


def load_rounded(folder: Path):
    """The model as the scorer loads it in bfloat16."""
    return rounded(load_decoder(folder, "bfloat16", packed=False))


def rounded(model):
    """Replace the layers' products, in place, where the processor has none of its own for bfloat16;
    returns the model."""
    if model.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, Rounded(child))
    return model


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
