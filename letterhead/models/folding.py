"""A letter is a head: an SFT checkpoint folded into an ordinary sequence classifier.

The score rows are the vocabulary projection's rows of the option letters, so that, given the ids of
a prompt through its think block (PromptEncoder.encode_before_option), the logits are the letters'
scores.
"""

import json
import re
from pathlib import Path

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, atomic_folder, model_identity, read_json, write_json
from letterhead.models.checkpoints import temper
from letterhead.models.classifier import ON_PROMPT, model_folder
from letterhead.models.cpu import pack
from letterhead.models.heads import ready
from letterhead.models.prompt import PromptEncoder, load_prompt_encoder
from letterhead.models.scoring import load_decoder
from letterhead.runs import contenders, results
from letterhead.runs.terminal import progress

TOLERANCE = 1e-4
CHECKED_ROWS = 512
FORM = 2  # counted up when what is written beside the weights changes


def export_folded(experiment: Experiment, name: str) -> tuple[Path, dict]:
    """Fold a checkpoint, check it on up to 512 test rows, and write it to
    runs/<experiment>/export/NAME, unless it is there.

    Returns
    -------
    tuple : the folder, and what letterhead_export.json in it says

    Raises
    ------
    LetterheadError : a checkpoint that is not there, or one that can't be folded
    """
    source, target = model_folder(experiment, name), experiment.run_folder / "export" / name
    encoder = load_prompt_encoder(experiment)
    made_from = {
        "model": model_identity(source),
        "prompt": experiment.prompt.model_dump(),
        "labels": experiment.labels,
    }
    at = contenders.temperature_of(experiment, name)
    made_from |= {"answers": [answer.ids for answer in encoder.answers], "form": FORM}
    made_from |= {"temperature": at}
    facts = read_json(target / ON_PROMPT)
    if facts and facts["made_from"] == made_from:
        return target, facts
    prompts = _prompts(experiment, encoder)
    decoder = load_decoder(source, "float32", packed=False)
    folded = fold(decoder, encoder, experiment.labels)
    with atomic_folder(target) as folder:
        folded.save_pretrained(folder)
        as_written = write_tokenizer(experiment, folder)
        off, same = compare(pack(decoder), pack(folded.to(decoder.device)), encoder, prompts)
        if not off <= TOLERANCE:
            raise LetterheadError(
                f"{source}: the folded logits differ by {off:.2g} from the decoder's; this "
                f"model can't be folded"
            )
        facts = {"made_from": made_from, "largest_difference": off, "same_predictions": same}
        facts |= {"architecture": type(folded).__name__, **as_written}
        temper(folder, at)
        write_json(folder / ON_PROMPT, facts)
    return target, facts


def write_tokenizer(experiment: Experiment, folder: Path) -> dict[str, int]:
    """Write the tokenizer of a model that reads the prompt to its folder, with the chat template of
    training.

    `apply_chat_template` with `enable_thinking=False` then gives the prompt through its think block
    (a model's own template may add a system prompt), and the block is encoded as in training, where
    the option follows it. (By itself SmolLM2's vocabulary would make one token of a closing blank
    line that training sees as two.)

    Returns
    -------
    dict : on how many of up to 512 test rows the chat template, and the prompt sent as text, give
        the ids of training
    """
    encoder = load_prompt_encoder(experiment)
    tokenizer, rows = encoder.tokenizer, results.read_rows(experiment, "test")[:CHECKED_ROWS]
    trained = [encoder.encode_before_option(row["text"]) for row in rows]
    asked = [[{"role": "user", "content": encoder.instruction(row["text"])}] for row in rows]
    tokenizer.chat_template = None
    encoder.template.fix_jinja_template(tokenizer)
    block = ""
    plain = encoder.encode_before_option("text")
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": encoder.instruction("text")}]
        question = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        block = whole.removeprefix(question) if whole.startswith(question) else ""
    if block:
        unthinking = (
            "messages[-1]['role'] == 'user' and enable_thinking is defined and not enable_thinking"
        )
        tokenizer.chat_template += (
            f"{{% if {unthinking} %}}{{{{ {json.dumps(block)} }}}}{{% endif %}}"
        )
        keep_last_tokens_apart(tokenizer, block, plain)
    tokenizer.save_pretrained(folder)
    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    by_chat = written.chat_template and [
        written.apply_chat_template(messages, enable_thinking=False, return_dict=False)
        for messages in asked
    ]
    return {
        "rows_checked": len(rows),
        "rows_whose_chat_template_gives_the_ids": sum(map(list.__eq__, by_chat or [], trained)),
        "rows_whose_prompt_works_as_text": sum(
            written(tokenizer.decode(ids))["input_ids"] == ids for ids in trained
        ),
    }


def keep_last_tokens_apart(tokenizer, text: str, ids: list[int]) -> None:
    """Have a tokenizer encode `text`, where it ends a string, to the last of `ids`, by a split
    before its own pre-tokenizer; one that does so by itself, or can't be made to, is left as it
    is."""
    backend, own = tokenizer.backend_tokenizer, tokenizer.backend_tokenizer.pre_tokenizer
    patterns, rest = [], ""
    for token in reversed(ids):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        if encoded == ids[-len(encoded) :]:
            return
        piece = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        before = text.removesuffix(piece + rest)
        if not piece or before in ("", text):
            break
        patterns.append(f"(?<={re.escape(before)}){re.escape(piece)}(?={re.escape(rest)}\\z)")
        rest = piece + rest
        split = pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, own] if own else [split])
    backend.pre_tokenizer = own


def _prompts(experiment: Experiment, encoder: PromptEncoder) -> list[list[int]]:
    return [
        encoder.encode_before_option(row["text"])
        for row in results.read_rows(experiment, "test")[:CHECKED_ROWS]
    ]


def load_folded(experiment: Experiment, encoder: PromptEncoder):
    """The decoder untrained, folded, in float32 and ready for the heads' trainer.

    Raises
    ------
    LetterheadError : as `fold`
    """
    decoder = load_decoder(experiment.decoder.folder, "float32", packed=False)
    return ready(fold(decoder, encoder, experiment.labels, is_start=True))


def fold(decoder, encoder: PromptEncoder, labels: list[str], is_start: bool = False):
    """The sequence classifier whose scores are the decoder's logits of the option letters.

    Parameters
    ----------
    is_start : training starts from it, so that options may have several tokens: an option's row is
        then the mean of its tokens' rows, and no logit of the decoder's

    Raises
    ------
    LetterheadError : options of several tokens, or an architecture without a sequence classifier
    """
    answers = encoder.answers
    spelled = [answer.ids[answer.start : answer.stop] for answer in answers]
    if not is_start and (
        any(len(ids) != 1 for ids in spelled)
        or len({tuple(answer.ids[: answer.start]) for answer in answers}) != 1
    ):
        raise LetterheadError(
            "an option has several tokens, and only single letters can be folded; set "
            "prompt.options: letters"
        )
    config = decoder.config.__class__.from_dict(decoder.config.to_dict())
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.pad_token_id, config.tie_word_embeddings = encoder.tokenizer.pad_token_id, False
    try:
        folded = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise LetterheadError(
            f"{config.model_type}: transformers has no sequence classifier for it ({error})"
        ) from None
    folded.base_model.load_state_dict(decoder.base_model.state_dict())
    with torch.no_grad():
        projection = decoder.get_output_embeddings().weight
        folded.score.weight.copy_(torch.stack([projection[ids].mean(dim=0) for ids in spelled]))
    return folded.eval()


@torch.inference_mode()
def compare(decoder, folded, encoder: PromptEncoder, prompts: list[list[int]]) -> tuple[float, int]:
    """The largest difference between the folded logits and the decoder's logits of the letters, and
    on how many prompts both have the same highest."""
    letters = [answer.ids[answer.start] for answer in encoder.answers]
    off, same = 0.0, 0
    for ids in progress(prompts, desc="checking the fold", unit=" rows"):
        inputs = torch.tensor([ids], device=decoder.device)
        own, other = (
            decoder(inputs, logits_to_keep=1).logits[0, -1, letters],
            folded(inputs).logits[0],
        )
        difference = (other - own).abs().max().item()
        off = off if difference <= off else difference  # one that is not a number stays
        same += int(own.argmax() == other.argmax())
    return off, same


def text_gives_ids(encoder: PromptEncoder, ids: list[int]) -> bool:
    """Whether the prompt written as text is encoded to the same ids."""
    text = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return encoder.tokenizer(text)["input_ids"] == ids
