"""A CPU is used for what it can do: the precision by capability and measurement, the same results
however it multiplies."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from letterhead.files import read_json
from letterhead.models import cpu, llamafactory
from letterhead.models.cpu import (
    PackedLinear,
    linear_shapes,
    matmul_rates,
    pack,
    prefers_bfloat16,
    quick_dropout,
    quicken_dropout,
    use_onednn,
)
from letterhead.models.precision import precision
from letterhead.models.scoring import load_decoder, score_options
from tests.test_scoring import NAMES, TEXTS, encoder_of
from train.sft_worker import LessWork

needs_bfloat16 = pytest.mark.skipif(
    not cpu.multiplies_bfloat16(), reason="this processor does not multiply bfloat16"
)


@pytest.fixture
def capable(monkeypatch):
    """Patch what the processor can do and what was measured; returns how often it was measured."""
    asked = []

    def patch(can: dict, float32: float, bfloat16: float) -> list:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
        rates = {"float32": float32, "bfloat16": bfloat16}
        monkeypatch.setattr(
            cpu, "matmul_rates", lambda shapes, dtypes: asked.append(shapes) or rates
        )
        return asked

    return patch


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
def test_auto_is_bfloat16_where_the_processor_has_it_and_is_measured_faster(
    tiny_models, workplace, capable, instructions
):
    folder = tiny_models["smollm2"]
    asked = capable({instructions: True}, float32=200.0, bfloat16=400.0)
    assert precision("auto", folder) == "bfloat16" and precision("float32", folder) == "float32"
    assert precision("auto", folder) == "bfloat16" and len(asked) == 1  # measured once, then known
    (known,) = read_json(cpu.MEASURED).values()
    assert known["gflops"] == {"float32": 200.0, "bfloat16": 400.0}
    capable({instructions: True, "another": True}, float32=200.0, bfloat16=150.0)
    assert precision("auto", folder) == "float32" and len(asked) == 2  # another processor


def test_auto_is_float32_where_the_processor_has_no_bfloat16(tiny_models, workplace, capable):
    asked = capable({"avx512_f": True, "avx2": True}, float32=1.0, bfloat16=9.0)
    assert precision("auto", tiny_models["smollm2"]) == "float32" and not asked
    assert not prefers_bfloat16(tiny_models["smollm2"])


def test_onednn_takes_float32_only_where_it_stays_float32(capable):
    before, has_amx = (
        torch.get_float32_matmul_precision(),
        torch.cpu._is_amx_tile_supported(),
    )  # asked before the patch
    try:
        torch.set_float32_matmul_precision("highest")
        capable({"amx_tile": True}, 1.0, 1.0)
        use_onednn()
        assert torch.get_float32_matmul_precision() == "highest"
        capable({"avx512_bf16": True}, 1.0, 1.0)
        use_onednn()
        assert torch.get_float32_matmul_precision() == "medium"
        a, b = torch.randn(300, 500), torch.randn(500, 200)
        if not has_amx:  # the same to float32's rounding; bfloat16's would be 1e-1
            assert ((a @ b) - (a.double() @ b.double())).abs().max() < 1e-3
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_measured_are_the_models_own_shapes(tiny_models):
    shapes = linear_shapes(
        tiny_models["qwen3"]
    )  # 2 layers, hidden 32, 4 heads and 2 key-value heads of 8, 64 between
    assert shapes == Counter({(32, 32): 4, (32, 16): 4, (32, 64): 4, (64, 32): 2})
    assert all(rate > 0 for rate in matmul_rates(shapes, ["float32"], seconds=0).values())


def test_sft_is_told_the_precision_that_the_yaml_leaves_open(make_experiment, capable):
    capable({"avx512_bf16": True}, float32=200.0, bfloat16=400.0)

    def told(dtype: str, **sft) -> dict:
        return llamafactory.for_device(
            make_experiment("rows.csv", ["a", "b"], sft=sft, decoder_keys={"dtype": dtype})
        )

    on_cpu = {"use_cpu": True, "flash_attn": "disabled"}
    assert told("auto") == {"bf16": True} | on_cpu and told("float32") == {"bf16": False} | on_cpu
    assert told("auto", bf16=False, flash_attn="sdpa") == {"use_cpu": True}


def batch_of(folder) -> dict[str, torch.Tensor]:
    """Three rows padded on the right, as LLaMA-Factory's collator makes them; each has its answer
    elsewhere."""
    encoder = encoder_of(folder, "letters", NAMES[:3])
    rows = [
        (encoder.encode(text), answer.ids)
        for text, answer in zip(TEXTS, encoder.answers, strict=False)
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = {
        name: torch.full((len(rows), width), fill)
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for i, (prompt, answer) in enumerate(rows):
        n = len(prompt) + len(answer)
        batch["input_ids"][i, :n], batch["attention_mask"][i, :n] = torch.tensor(prompt + answer), 1
        batch["labels"][i, len(prompt) : n] = torch.tensor(answer)
    return batch


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_bfloat16)])
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_projecting_answers_only_gives_the_loss_and_gradients_of_projecting_all(
    tiny_models, name, half
):
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_models[name], dtype=torch.float32, attn_implementation="eager"
    ).train()
    ours, batch, projected = copy.deepcopy(plain), batch_of(tiny_models[name]), []
    LessWork().on_init_end(None, None, None, model=ours)
    assert (plain.config._attn_implementation, ours.config._attn_implementation) == (
        "eager",
        "matrix_products",
    )
    ours.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: projected.append(len(inputs[0]))
    )
    for more in (
        {},
        {"num_items_in_batch": torch.tensor(50)},
    ):  # as the Trainer calls it with gradient accumulation
        losses = []
        for model in (plain, ours):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                losses.append(model(**batch, **more).loss)
            losses[-1].backward()
        rtol = 1e-2 if half else 1e-5
        assert torch.allclose(*losses, rtol=rtol)
        for (key, theirs), mine in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert (theirs.grad - mine.grad).norm() <= rtol * 10 * theirs.grad.norm() + 1e-6, key
    tokens = int((batch["labels"] != -100).sum())
    assert projected == [tokens, tokens] and tokens < batch["labels"].numel() / 4
    rows = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.allclose(
        ours(**rows).logits, plain(**rows).logits, atol=1e-4
    )  # without labels nothing changes


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_bfloat16)])
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "bert"])
def test_attention_by_matrix_products_gives_what_eager_gives(tiny_models, name, half):
    """Causal and not, heads that share keys and heads that do not, rows padded; outputs and
    gradients."""
    batch = {
        "input_ids": torch.arange(5, 65).view(3, 20),
        "attention_mask": torch.ones(3, 20, dtype=torch.long),
    }
    batch["attention_mask"][1, 7:] = 0
    hidden, gradients = [], []
    for attention in ("eager", "matrix_products"):
        model = AutoModel.from_pretrained(
            tiny_models[name], dtype=torch.float32, attn_implementation=attention
        ).eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            seen = model(**batch).last_hidden_state.float() * batch["attention_mask"][..., None]
        seen.square().sum().backward()
        hidden.append(seen.detach())
        gradients.append(
            torch.cat([of.grad.flatten() for of in model.parameters() if of.grad is not None])
        )
    for eager, ours in (hidden, gradients):
        assert (eager - ours).norm() <= (2e-2 if half else 1e-5) * eager.norm()


def test_quick_dropout_drops_the_share_it_is_told_and_keeps_the_mean():
    torch.manual_seed(0)
    rows = torch.ones(999, 1001, requires_grad=True)
    dropped = quick_dropout(rows, 0.1)
    dropped.sum().backward()
    share, n = (dropped == 0).float().mean().item(), rows.numel()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5 and torch.equal(
        rows.grad, dropped.detach()
    )
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / 0.9))
    neighbours = (
        ((dropped[:, 1:] == 0) & (dropped[:, :-1] == 0)).float().mean().item()
    )  # drawn independently
    assert abs(neighbours - 0.01) < 5e-4 and not torch.equal(quick_dropout(rows, 0.1), dropped)
    torch.manual_seed(0)
    assert torch.equal(quick_dropout(rows, 0.1), dropped)
    layer = quicken_dropout(torch.nn.Sequential(torch.nn.Dropout(0.5)))
    assert (layer(rows) == 0).any() and torch.equal(layer.eval()(rows), rows)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_scores_are_the_same_packed_or_not_in_any_batch_on_one_thread_or_two(fetched, dtype):
    encoder, tolerance = (
        encoder_of(fetched["smollm2"], "names", NAMES),
        1e-4 if dtype == "float32" else 1.0,
    )
    prompts, threads = [encoder.encode(text) for text in TEXTS], torch.get_num_threads()
    packed, plain = (load_decoder(fetched["smollm2"], dtype, packed=how) for how in (True, False))
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    expected = score_options(plain, prompts, encoder.answers, True, 100_000).log_likelihood
    try:
        for model, batch_tokens, n in (
            (packed, 100_000, 2),
            (packed, 256, 2),
            (packed, 1, 1),
            (plain, 256, 1),
        ):
            torch.set_num_threads(n)
            found = score_options(
                model, prompts, encoder.answers, True, batch_tokens
            ).log_likelihood
            assert np.abs(found - expected).max() < tolerance
    finally:
        torch.set_num_threads(threads)


@needs_bfloat16
def test_a_packed_layer_in_bfloat16_gives_what_the_layer_gives():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 16, bias=False)).to(
        torch.bfloat16
    )
    packed, rows = pack(copy.deepcopy(plain)), torch.randn(7, 48, dtype=torch.bfloat16)
    assert all(isinstance(module, PackedLinear) for module in packed)
    with torch.inference_mode():
        assert torch.allclose(plain(rows), packed(rows), atol=1e-2)
