"""Fold an SFT checkpoint into an ordinary sequence classifier: a letter is a head.

    python -m serve.export --experiment quick --model sft@80

The score rows are the vocabulary projection's rows of the option letters, so that, given the ids of a prompt through its
think block, the logits are the letters' scores. Anything that takes a sequence classifier serves it.
"""

import os

import torch
from transformers import AutoModelForSequenceClassification

from letterhead import results
from letterhead.classifier import model_folder, named_method
from letterhead.experiment import Experiment
from letterhead.prompt import PromptEncoder, load_prompt_encoder
from letterhead.records import LetterheadError, atomic_folder, write_json
from letterhead.scoring import load_decoder
from letterhead.stage import OFFLINE, run

CHECKED_ROWS = 64
TOLERANCE = 1e-4


def main(experiment: Experiment, model: str) -> None:
    os.environ.update(OFFLINE)
    name = named_method(experiment, model)
    if not name.startswith("sft@"):
        raise LetterheadError(f"{name}: is no SFT checkpoint; BERT and the linear head are sequence classifiers already")
    encoder, source = load_prompt_encoder(experiment), model_folder(experiment, name)
    rows = results.read_rows(experiment, "test")[:CHECKED_ROWS]
    prompts = [folded_prompt(encoder, row["text"]) for row in rows]
    decoder = load_decoder(source, "float32")
    folded = fold(decoder, encoder, experiment.labels)
    off = largest_difference(decoder, folded, encoder, prompts)
    if off > TOLERANCE:
        raise LetterheadError(
            f"{source}: the folded logits differ by {off:.2g} from the decoder's; this model can't be folded"
        )
    as_text = sum(text_gives_ids(encoder, ids) for ids in prompts)
    target = experiment.run_folder / "export" / name
    with atomic_folder(target) as folder:
        folded.save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)
        facts = {"model": str(source), "labels": experiment.labels, "options": encoder.options, "largest_difference": off}
        facts |= {"rows_checked": len(rows), "rows_whose_prompt_works_as_text": as_text}
        write_json(folder / "letterhead_export.json", facts)
    print(f"{target}: {type(folded).__name__}, logits within {off:.2g} of the decoder's on {len(rows)} rows")
    if as_text == len(rows):
        print("the prompt works as text too: the tokenizer gives the ids of training on all rows")
    else:
        print(f"send token ids, not text: the tokenizer gives the ids of training on {as_text} of {len(rows)} rows")


def folded_prompt(encoder: PromptEncoder, text: str) -> list[int]:
    """What a folded model reads: the prompt, and the answer's tokens before its letter."""
    answer = encoder.answers[0]
    return [*encoder.encode(text), *answer.ids[: answer.start]]


def fold(decoder, encoder: PromptEncoder, labels: list[str]):
    """The sequence classifier whose scores are the decoder's logits of the option letters.

    Raises
    ------
    LetterheadError : options of several tokens, or an architecture without a sequence classifier
    """
    answers = encoder.answers
    spelled = [answer.ids[answer.start : answer.stop] for answer in answers]
    if any(len(ids) != 1 for ids in spelled) or len({tuple(answer.ids[: answer.start]) for answer in answers}) != 1:
        raise LetterheadError(
            "an option has several tokens, and only single letters can be folded; set prompt.options: letters"
        )
    config = decoder.config.__class__.from_dict(decoder.config.to_dict())
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.pad_token_id, config.tie_word_embeddings = encoder.tokenizer.pad_token_id, False
    try:
        folded = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise LetterheadError(f"{config.model_type}: transformers has no sequence classifier for it ({error})") from None
    folded.base_model.load_state_dict(decoder.base_model.state_dict())
    with torch.no_grad():
        folded.score.weight.copy_(decoder.get_output_embeddings().weight[[ids[0] for ids in spelled]])
    return folded.eval()


@torch.inference_mode()
def largest_difference(decoder, folded, encoder: PromptEncoder, prompts: list[list[int]]) -> float:
    """The largest difference between the folded logits and the decoder's logits of the letters."""
    letters = [answer.ids[answer.start] for answer in encoder.answers]
    off = 0.0
    for ids in prompts:
        given = torch.tensor([ids], device=decoder.device)
        own = decoder(given, logits_to_keep=1).logits[0, -1, letters]
        off = max(off, (folded.to(decoder.device)(given).logits[0] - own).abs().max().item())
    return off


def text_gives_ids(encoder: PromptEncoder, ids: list[int]) -> bool:
    """Whether the prompt written as text is encoded to the same ids."""
    text = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return encoder.tokenizer(text)["input_ids"] == ids


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"model": "sft@STEP, or sft for the one that was chosen"})
