"""Rank the training rows by how far the untrained decoder prefers the right option: easy rows first
learnt, hard ones last.

python -m eval.rank --experiment ag_news_base

runs/EXPERIMENT/rank/margins.jsonl holds a row's id and its margin: the right option's mean
log-likelihood a token, less the best other option's.
"""

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import write_jsonl
from letterhead.models.scoring import load_decoder, score_in_parts
from letterhead.pipeline import RANK
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import StageRun, run


def main(experiment: Experiment) -> None:
    from eval.score import split_prompts

    folder = experiment.decoder.folder
    stage = StageRun(experiment, RANK)
    path = stage.folder / "margins.jsonl"
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        encoder, prompts = split_prompts(experiment)
        rows, ids = prompts("train")
        with_end = experiment.prompt.options == "names"
        with Workers(process_count(), load_decoder, folder, experiment.decoder.dtype) as workers:
            scores, _ = score_in_parts(
                workers,
                ids,
                encoder.answers,
                with_end,
                experiment.eval.batch_tokens,
                "ranking training rows",
            )
        write_jsonl(
            path,
            margins(
                rows, scores.score(experiment.eval.score), results.class_numbers(experiment, rows)
            ),
        )
        stage.finish([path], rows=len(rows))
    print(
        f"{path}: data.rows.ranking={path} data.rows.train_from=hard takes the hardest "
        f"rows of each label"
    )


def margins(rows: list[dict], score: np.ndarray, truth: np.ndarray) -> list[dict]:
    """Each row's id and margin, from scores of shape (rows, options) and class numbers of shape
    (rows,)."""
    own = score[np.arange(len(rows)), truth]
    others = np.where(np.arange(score.shape[1]) == truth[:, None], -np.inf, score).max(axis=1)
    return [
        {"id": row["id"], "margin": float(by)} for row, by in zip(rows, own - others, strict=True)
    ]


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
