"""SetFit (Tunstall et al. 2022): the encoder is fine-tuned so that rows of one class lie near each
other, by contrast of pairs; logistic regression reads its embeddings. For few rows."""

import math
from tempfile import TemporaryDirectory

from sklearn.linear_model import LogisticRegression

from letterhead.config.experiment import Experiment
from letterhead.models.callbacks import StepBar
from letterhead.models.cpu import attention, quicken_dropout
from letterhead.models.embeddings import Embedder, as_fitted
from letterhead.models.fitted import Fitted, class_weight, require_classes


def fit(experiment: Experiment, rows: list[dict]) -> Fitted:
    """Train it on rows.

    Raises
    ------
    LetterheadError : only one class is among them
    """
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    require_classes(rows)
    settings, embedder = experiment.encoder.setfit, Embedder(experiment)
    # On a CPU torch's fused attention with dropout takes most of a step.
    embedder.model[0].auto_model.set_attn_implementation(attention())
    quicken_dropout(embedder.model)
    clean = embedder.reader.neutralise([row["text"] for row in rows])
    columns = {
        "text": [embedder.prefix + text for text in clean],
        "label": [row["label"] for row in rows],
    }
    regression = LogisticRegression(
        max_iter=1000, class_weight=class_weight(experiment), random_state=experiment.seed
    )
    prompt, embedder.model.default_prompt_name = embedder.model.default_prompt_name, None
    # SetFit takes max_steps for the number of steps, also where the pairs are fewer.
    pairs = 2 * settings.iterations * len(rows)
    steps = min(settings.most_steps, math.ceil(pairs / settings.batch))
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            batch_size=settings.batch,
            num_epochs=1,
            num_iterations=settings.iterations,
            max_steps=steps,
            body_learning_rate=settings.learning_rate,
            seed=experiment.seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
        )
        model = SetFitModel(embedder.model, regression, normalize_embeddings=True)
        bar = StepBar("SetFit")
        Trainer(model, arguments, Dataset.from_dict(columns), callbacks=[bar]).train()
    embedder.model.default_prompt_name = prompt
    title = f"{embedder.folder}, fine-tuned by SetFit, logistic regression"
    return as_fitted(experiment, embedder, regression, title, is_frozen=False)
