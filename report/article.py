"""The published experiment that experiments/ag_news.yaml repeats: its figures, and where it
contradicts itself.

Qwen3-0.6B against BERT on AG News, 2025-05-22, one RTX 3090 (24 GB); F1 is the best of its
checkpoints on the test set.
"""

from letterhead.config.experiment import Experiment
from letterhead.config.models import source_name
from letterhead.pipeline import BERT, LINEAR_HEAD, SFT, ZERO_SHOT_LETTERS, ZERO_SHOT_THINKING

# method → accuracy, macro F1, hours to train and score
FIGURES = {
    ZERO_SHOT_LETTERS.name: {"accuracy": 0.7898},
    ZERO_SHOT_THINKING.name: {"accuracy": 0.7997},
    BERT.name: {"accuracy": 0.946184, "f1_macro": 0.946159, "hours": 0.58},
    LINEAR_HEAD.name: {"accuracy": 0.949079, "f1_macro": 0.949029, "hours": 0.86},
    SFT.name: {"accuracy": 0.941, "f1_macro": 0.941, "hours": 1.5},
}
# method, engine, decode → requests per second of a single stream, one RTX 3090
RPS = {
    (BERT.name, "hf", "head"): 60.3,
    (SFT.name, "hf", "generate"): 13.2,
    (SFT.name, "vllm", "generate"): 27.1,
    (LINEAR_HEAD.name, "hf", "head"): 38.1,
}
SLIPS = (
    "BERT's best F1 is 0.946 in its table (step 3,948) and 0.945 in its text and conclusion.",
    "Its conclusion ranks the time SFT > BERT > linear head; its table says SFT "
    "(1.5 h) > linear head (0.86 h) > BERT "
    "(0.58 h).",
    "It calls BERT badly overfitted after two epochs; its table shows a test loss "
    "of 0.169 near the end of epoch two, 0.172 "
    "at the end of epoch three, and an F1 that rises from 0.9445 to 0.9452 in between.",
    "It chooses every checkpoint on the test set and gives no test of significance.",
)


def is_the_articles(experiment: Experiment) -> bool:
    """Whether an experiment has the article's data and models, so that its figures may stand beside
    ours."""
    named = (
        experiment.data.source.partition("@")[0],
        *map(source_name, (experiment.decoder.model, experiment.encoder.model)),
    )
    theirs = ("hf:fancyzhx/ag_news", "hf:Qwen/Qwen3-0.6B", "hf:google-bert/bert-base-cased")
    rows = experiment.data.rows
    whole = rows.train is None and rows.test is None and experiment.decoder.train_rows is None
    return whole and named == theirs
