"""make try: the page answers with every trained method, in a real browser, and asks nobody else for
anything."""

import csv
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from letterhead.files import LetterheadError, write_json
from letterhead.models import heads
from letterhead.models.classifier import CascadeClassifier
from letterhead.models.prompt import load_prompt_encoder
from letterhead.stats.cascade import Cascade
from prep import data
from serve import page
from tests.browser import Browser, needs_browser
from tests.conftest import ROOT
from tests.test_data import write_csv
from train import fitted

LABELS = ["<b>World</b>", "Sports"]
TITLES = {"tfidf": "TF-IDF + logistic regression", "bert@9": "BERT", "sft@0": "LLM, SFT"}


@pytest.fixture
def experiment(make_experiment, tiny_models):
    write_csv(
        "rows.csv",
        [(f"text {i} about {'goals' if i % 2 else 'wars'}", LABELS[i % 2]) for i in range(80)],
    )
    made = make_experiment("rows.csv", LABELS)
    data.main(made)
    fitted.main(made, "tfidf")
    checkpoint = Path("runs/mine/bert/checkpoints/checkpoint-9")
    heads.load_head(tiny_models["bert"], LABELS).save_pretrained(checkpoint)
    heads.load_tokenizer(tiny_models["bert"]).save_pretrained(checkpoint)
    write_json(checkpoint / "trainer_state.json", {"global_step": 9})
    figures = {
        "tfidf": 0.9,
        "bert@9": 0.8,
        "sft@0": 0.7,
        "zero_shot_think": 0.2,
        "linear_head@9": 0.1,
    }
    methods = {
        name: {"method": name.partition("@")[0], "title": TITLES.get(name, name), "f1_macro": f1}
        for name, f1 in figures.items()
    }
    write_json("runs/mine/results/comparison.json", {"methods": methods})
    write_json("runs/mine/results/decision.json", {"ship": "tfidf"})
    return made


@pytest.fixture
def address(experiment):
    """The page, served by a process of its own, as `make try` does."""
    with socket.socket() as free:
        free.bind((page.HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serve.page", "--experiment", "mine", "--port", str(port)]
    with open("page.log", "w") as log:
        server = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )
    try:
        until = time.time() + 120
        while "Ctrl-C" not in Path("page.log").read_text():
            assert server.poll() is None and time.time() < until, Path("page.log").read_text()
            time.sleep(0.2)
        address = f"http://{page.HOST}:{port}"
        while True:
            with suppress(httpx.ConnectError):
                httpx.get(address, trust_env=False)
                break
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def test_what_answers_are_the_trained_methods_and_the_ids_are_those_of_training(experiment):
    assert list(page.trained_methods(experiment)) == list(
        TITLES
    )  # the linear head's checkpoint is gone
    answers = page.answer(experiment, {"a": lambda texts: np.array([[0.25, 0.75]])}, "  some text ")
    assert answers[0].shares == {LABELS[0]: 0.25, "Sports": 0.75} and answers[0].milliseconds > 0
    with pytest.raises(LetterheadError, match="the text is empty"):
        page.answer(experiment, {}, " \n")
    encoder = load_prompt_encoder(experiment)
    prompt, ids = page.prompt_of(experiment, encoder, "Goals and <|im_end|> more")
    assert (
        prompt == encoder.tokenizer.decode(encoder.encode("Goals and <|im_end|> more"))
        and "< |im_end|>" in prompt
    )
    answer = encoder.answers[1]
    assert f"B = Sports: {answer.ids[answer.start]}" in ids


def test_a_cascade_says_which_half_answered_and_the_price_of_that():
    frozen = Cascade("tfidf", "bert@9", (1.0, 1.0), 0.7, 0.0)
    dear, halves = np.array([[0.9, 0.1]]), {"cheap": "tfidf", "dear": "bert@9"}
    methods = {name: {"title": title} for name, title in TITLES.items()}
    methods["cascade:bert"] = {"title": "Cascade", "halves": halves}
    experiment = SimpleNamespace(labels=LABELS, data=SimpleNamespace(max_words=None))
    prices = {"tfidf": 2, "bert@9": 3000}
    for sure, half, times in ((0.8, "TF-IDF + logistic regression", "1"), (0.6, "BERT", "1,500")):
        cheap = np.array([[1 - sure, sure]])
        classify = CascadeClassifier(frozen, lambda _, cheap=cheap: cheap, lambda _: dear)
        (answered,) = page.answer(experiment, {"cascade:bert": classify}, "a text")
        assert answered.is_deferred == (half == "BERT")
        assert answered.shares["Sports"] == pytest.approx(0.8 if half != "BERT" else 0.1)
        said = page.who_answered(methods, prices, "cascade:bert", answered)
        assert said == f", answered by {half}, price {times}"
        said = page.who_answered(methods, {}, "cascade:bert", answered)
        assert said == f", answered by {half}"  # as long as nothing was decided
    alone = page.Answer({}, 1.0)
    assert page.who_answered(methods, prices, "tfidf", alone) == ", price 1"
    assert page.who_answered(methods, prices, "sft@0", alone) == ""
    assert page.who_answered(methods, {"tfidf": 0}, "tfidf", alone) == ""


def test_without_a_comparison_and_on_a_port_that_is_taken_the_mend_is_named(experiment):
    Path("runs/mine/results/comparison.json").unlink()
    with pytest.raises(LetterheadError, match="nothing is trained yet; run: make report EXP=mine"):
        page.trained_methods(experiment)
    with socket.socket() as taken:
        taken.bind((page.HOST, 0))
        taken.listen()
        with pytest.raises(LetterheadError, match="is taken .*in use.*name another with PORT="):
            page.main(experiment, str(taken.getsockname()[1]))
    with pytest.raises(LetterheadError, match="PORT=high: not a port"):
        page.main(experiment, "high")


@needs_browser
def test_a_text_and_a_file_are_labelled_in_a_real_browser_that_asks_nobody_else(address, tmp_path):
    assert (
        "default-src 'self'"
        in httpx.get(address, trust_env=False).headers["content-security-policy"]
    )
    assert httpx.get(address, headers={"Host": "evil.example"}, trust_env=False).status_code == 400
    write_csv(tmp_path / "new.csv", [("goals and more", 1), ("wars, again", 2)], ("text", "n"))
    for width in (390, 1280):
        with Browser(width) as browser:
            browser.open(address)
            wait = WebDriverWait(browser.driver, 60)
            wait.until(lambda driver: driver.find_elements(By.TAG_NAME, "textarea"))[0].send_keys(
                "nothing but goals"
            )
            button(browser, "Label it").click()
            wait.until(lambda driver: "%" in driver.find_element(By.TAG_NAME, "body").text)
            shown = browser.driver.find_element(By.TAG_NAME, "body").text
            assert "Sports" in shown and "<b>World</b>" in shown  # a label's markup is text
            assert all(title in shown for title in TITLES.values()) and shown.count(" ms") == len(
                TITLES
            )
            button(browser, "What the LLM reads").click()
            read = wait.until(
                lambda driver: [
                    of for of in written(driver) if "nothing but goals" in of and "Sports" in of
                ]
            )
            assert (
                any("B = Sports: " in of for of in written(browser.driver))
                and "<|im_start|>" in read[0]
            )
            assert "radio" not in shown  # no links of the library's
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            button(browser, "Label a file").click()
            inputs = wait.until(
                lambda driver: driver.find_elements(By.CSS_SELECTOR, "input[type=file]")
            )
            inputs[0].send_keys(str(tmp_path / "new.csv"))
            wait.until(
                lambda driver: driver.find_elements(By.CSS_SELECTOR, "a[href*='new.csv']")
            )  # it is uploaded
            button(browser, "Label the file").click()
            link = wait.until(
                lambda driver: driver.find_elements(By.CSS_SELECTOR, "a[href*='labelled.csv']")
            )[0]
            lines = list(
                csv.DictReader(
                    httpx.get(link.get_attribute("href"), trust_env=False).text.splitlines()
                )
            )
            assert [line["prediction"] for line in lines] == ["Sports", "<b>World</b>"] and lines[
                1
            ]["n"] == "2"
            assert not [told for told in browser.errors() if "Uncaught" in told]
            browser.screenshot(tmp_path / f"{width}.png")
            others = {
                url for url in browser.asked() if urlsplit(url).hostname not in (page.HOST, None)
            }
            assert not {
                url for url in others if not url.startswith(("data:", "blob:", "chrome"))
            }, others


def written(driver) -> list[str]:
    """What stands in the page's text boxes."""
    return [of.get_attribute("value") for of in driver.find_elements(By.TAG_NAME, "textarea")]


def button(browser: Browser, text: str):
    return browser.driver.find_element(By.XPATH, f"//button[contains(., '{text}')]")
