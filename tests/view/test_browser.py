"""The page in a real browser, used as a person uses it: by its controls, over the real server or as a file."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launcher import PROJECT
from tests.support.many_completions import write_run
from tests.view.hostile import TEXTS, write_hostile_run

pytestmark = pytest.mark.browser


def until(condition, seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def export(runs: Path, path: Path) -> None:
    """Write an export as a user does."""
    subprocess.run([sys.executable, "-m", "grpo.view", str(runs), "--export", str(path)], check=True, cwd=PROJECT)


def lines_of(folder: Path) -> list[dict]:
    files = sorted(folder.glob("rollouts-rank*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def answer(step: int, row: int, question: str, completion: str, reward: float) -> dict:
    return {
        "step": step, "row": row, "question": question, "gold": "1", "completion": completion, "finish": "stop",
        "rewards": {"f": reward}, "reward": reward, "advantage": reward - 0.5, "length": len(completion.split()),
    }  # fmt: skip


def write_small_run(folder: Path, answers: list[dict], settings: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "rollouts-rank0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.6}\n')
    (folder / "run.json").write_text(json.dumps({"settings": settings, "total_steps": 2}))
    (folder / "exit.json").write_text('{"code": 0, "reason": "done"}')


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """many: 1,200 completions. before, after: the same three questions, one gained, one lost, one equal."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "many", 1200, 120)
    before = [
        *(answer(1, g, "gain?", "I think it is 2", 0.0) for g in (0, 1)),
        *(answer(1, g, "lose?", "It is 1", 1.0) for g in (2, 3)),
        *(answer(1, g, "equal?", "same words", 1.0) for g in (4, 5)),
        answer(2, 0, "only before?", "x", 0.0),
    ]
    after = [
        *(answer(1, g, "gain?", "I think it must be 1 of course", 1.0) for g in (0, 1)),
        *(answer(1, g, "lose?", "It is 2", 0.0) for g in (2, 3)),
        *(answer(1, g, "equal?", "same words", 1.0) for g in (4, 5)),
    ]
    write_small_run(root / "after", after, {"lr": 1e-5, "seed": 1, "rewards": {"f": 1.0}})
    write_small_run(root / "before", before, {"lr": 1e-6, "seed": 1, "rewards": {"f": 1.0}})
    figures = [
        {"step": 1, "row": 0, "ids": [1, 2, 3], "texts": ["I think", " it is", " 2"],
         "logprob": [-0.001, -2.5, -0.7], "trained": "110"},
        {"step": 1, "row": 0, "policy": [-0.001, -2.4, -0.7], "ratio": [1.0, 1.2, 0.8]},
    ]  # fmt: skip
    (root / "before" / "tokens-rank0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in figures))
    return root


def test_answers_to_held_out_questions_of_one_run(viewer, new_page, tmp_path):
    """The same question at two evaluations: of 3, one is gained. Training has the same row numbers and stays apart."""
    folder = tmp_path / "run"
    write_small_run(folder, [answer(2, row, "trained?", "x", 1.0) for row in (0, 1)], {})
    texts = {0: ("It is 2", "It is 2", "It is 1"), 2: ("It is 1", "It is 2", "It is 1")}
    with (folder / "held_out-rank0.jsonl").open("w") as file:
        for step, answers in texts.items():
            for row, text in enumerate(answers):
                one = answer(step, row, f"asked {row}?", text, float(text.endswith("1"))) | {"advantage": None}
                file.write(json.dumps({**one, "set": ""}) + "\n")
    page = new_page()
    page.goto(viewer(tmp_path) + "#compare")
    page.wait_for_selector("html[data-ready]")
    assert page.input_value("#compare-of") == "1", "held out: training has no question twice"
    until(lambda: "1 gained, 0 lost" in page.inner_text("#summary"))
    until(lambda: page.locator("#compare mark").all_inner_texts() == ["2", "1"])
    go(page, "rollouts")
    until(lambda: count(page) == "1 groups, 2 of 8 completions")
    page.select_option("#of", "1")
    until(lambda: count(page) == "6 groups, 6 of 8 completions")
    page.wait_for_selector("#rollouts .detail h2:text-is('Step 2, held out')")


@pytest.fixture(scope="module")
def address(viewer, runs) -> str:
    return viewer(runs)


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("export") / "report.html"
    export(runs, path)
    return path.as_uri()


@pytest.fixture(params=["server", "file"])
def page(request, new_page):
    """The page over the server, and the exported file with the network cut: both must do the same."""
    is_file = request.param == "file"
    page = new_page(offline=is_file)
    page.goto(request.getfixturevalue("exported" if is_file else "address"))
    page.wait_for_selector("html[data-ready]")
    return page


def go(page, view: str) -> None:
    page.click(f"#tabs [data-view={view}]")
    page.wait_for_selector(f"#{view}:not([hidden])")


def count(page) -> str:
    return page.inner_text("#count")


def test_overview_shows_runs_curves_and_differences(page):
    names = page.locator(".runs tbody th").all_inner_texts()
    assert names == ["after", "before", "many"]
    assert page.locator(".runs .state").all_inner_texts()[:2] == ["done", "done"]
    reward = page.locator("[data-title=Reward]")
    assert reward.locator("path.line").count() == 3
    assert re.search(r"before\s+0\.6", reward.locator(".values").inner_text())
    differing = page.locator(".settings tbody th").all_inner_texts()
    assert differing == ["lr"], "seed and rewards are equal"
    page.locator(".runs input").nth(2).uncheck()
    page.wait_for_selector("[data-title=Reward] path.line >> nth=1")
    assert reward.locator("path.line").count() == 2


def test_smoothing_and_seconds_change_the_curve(page):
    reward = page.locator("[data-title=Reward]")
    path = "path.line:not(.faint).c2"
    raw = reward.locator(path).get_attribute("d")
    page.locator("#smoothing").fill("0.9")
    assert reward.locator(path).get_attribute("d") != raw and reward.locator("path.faint").count() == 3
    page.select_option("#axis", "seconds")
    assert re.search(r"\d (s|min)", reward.locator("svg").text_content())
    image = reward.locator("svg")
    image.focus()
    before = reward.locator(".values").inner_text()
    page.keyboard.press("ArrowLeft")
    assert reward.locator(".values").inner_text() != before, "arrow keys move along the curve"


def test_filters_find_what_the_file_holds(page, runs):
    """The expected numbers come from the files, read here by other means."""
    lines = lines_of(runs / "many")
    go(page, "rollouts")
    page.select_option("#run", label="many")
    page.select_option("#mode", "rows")
    until(lambda: count(page) == "1,200 of 1,200 completions")

    def expect(wanted) -> None:
        number = sum(map(wanted, lines))
        assert 0 < number < 1200
        until(lambda: count(page) == f"{number:,} of 1,200 completions")

    page.fill("#filter-low", "1")
    expect(lambda one: one["reward"] >= 1)
    page.select_option("#finish", "length")
    expect(lambda one: one["reward"] >= 1 and one["finish"] == "length")
    page.fill("#filter-low", "")
    page.select_option("#finish", "")
    page.fill("#filter-text", "QUESTION 12")
    expect(lambda one: "question 12" in one["question"].lower())
    page.fill("#filter-from", "3")
    page.fill("#filter-to", "9")
    page.fill("#filter-text", "因此 我们")
    expect(lambda one: "因此 我们" in one["completion"] and 3 <= one["step"] <= 9)
    for name in ("text", "from", "to"):
        page.fill(f"#filter-{name}", "")
    page.select_option("#by", "reward:rewards.py:short")
    page.fill("#filter-high", "0.25")
    expect(lambda one: one["rewards"]["rewards.py:short"] <= 0.25)


def test_sorting_puts_the_longest_first(page, runs):
    longest = max(lines_of(runs / "many"), key=lambda one: one["length"])
    go(page, "rollouts")
    page.select_option("#run", label="many")
    page.select_option("#mode", "rows")
    page.select_option("#sort", "length")
    first = page.locator("#rollouts .list-row[data-index='0']")
    until(lambda: f"length {longest['length']}" in first.inner_text())
    page.click("#direction")
    until(lambda: f"length {longest['length']}" not in first.inner_text())


def test_a_group_is_shown_whole_and_keys_move_on(page, runs):
    group = [one for one in lines_of(runs / "many") if one["step"] == 1 and one["row"] < 8]
    go(page, "rollouts")
    page.select_option("#run", label="many")
    page.click("#direction")  # oldest first
    page.locator("#rollouts .list").focus()
    page.keyboard.press("Home")
    page.wait_for_selector("#rollouts .detail h2:text-is('Step 1')")
    texts = page.locator("#rollouts .card .body").all_inner_texts()
    assert [re.sub(r"\s", "", text) for text in texts] == [
        re.sub(r"\s", "", one["completion"]) for one in sorted(group, key=lambda one: one["row"])
    ]
    assert page.locator("#rollouts .gold").inner_text() == f"gold {group[0]['gold']}"
    page.locator("#rollouts .list").focus()
    page.keyboard.press("End")
    page.wait_for_selector("#rollouts .detail h2:text-is('Step 19')")
    page.keyboard.press("Home")
    page.wait_for_selector("#rollouts .detail h2:text-is('Step 1')")


def test_tokens_are_shaded(page):
    go(page, "rollouts")
    page.select_option("#run", label="before")
    page.check("#filter-tokens")
    until(lambda: count(page) == "1 groups, 1 of 7 completions")
    card = page.locator("#rollouts .card[data-row='0']")
    card.locator("select.shade").select_option("logprob")
    tokens = card.locator(".token")
    until(lambda: tokens.count() == 3)
    assert tokens.all_inner_texts() == ["I think", " it is", " 2"]
    colours = [tokens.nth(i).evaluate("node => getComputedStyle(node).backgroundColor") for i in range(3)]
    strength = [float(re.search(r"([\d.]+)\)$", colour)[1]) for colour in colours]
    assert strength[0] == 0 < strength[2] < strength[1], "the less likely a token, the stronger its colour"
    assert "log-prob: −2.500" in tokens.nth(1).get_attribute("title")
    assert "ratio: 1.200" in tokens.nth(1).get_attribute("title")
    card.locator("select.shade").select_option("trained")
    until(lambda: tokens.nth(2).evaluate("node => getComputedStyle(node).backgroundColor") != "rgba(0, 0, 0, 0)")
    card.locator("select.shade").select_option("entropy")
    until(lambda: "No entropy was logged" in card.inner_text())


def test_tex_is_shown_as_symbols_when_asked_for(viewer, new_page, tmp_path):
    """As it stands by default; what is not known stays, a price is no formula, and markup remains text."""
    tex = r"So $\frac{1}{\sqrt{x+1}} \le x^{10}_2$, costs $5 or $6, \boxed{\frac{a}{b}} \unknown{<b>} \constructor 三"
    write_small_run(tmp_path / "run", [answer(1, 0, "$2^3$?", tex, 1.0)], {})
    page = new_page()
    page.goto(viewer(tmp_path) + "#rollouts")
    text = page.locator("#rollouts .card .text")
    until(lambda: text.count() == 1 and text.text_content() == tex)
    page.check("#maths")
    until(lambda: text.text_content() != tex)
    assert text.text_content() == "So 1/(√(x+1)) ≤ x¹⁰₂, costs $5 or $6, ⟦a/b⟧ \\unknown{<b>} \\constructor 三"
    assert page.locator("#rollouts .question .text").text_content() == "2³?"


def test_two_runs_are_compared(page):
    go(page, "compare")
    page.select_option("#side-a", label="before")
    page.select_option("#side-b", label="after")
    until(lambda: "1 gained, 1 lost" in page.inner_text("#summary"))
    until(lambda: page.inner_text("#summary").startswith("3 questions on both sides"))
    page.select_option("#kind", "gained")
    rows = page.locator("#compare .list-row")
    until(lambda: rows.count() == 1 and "gain?" in rows.inner_text())
    until(lambda: page.locator("#compare mark").all_inner_texts() == ["is", "must"])
    until(lambda: page.locator("#compare .common").all_inner_texts() == ["I think it ", "I think it "])
    until(lambda: "length +3" in rows.inner_text())
    page.select_option("#kind", "same")
    until(lambda: "equal?" in rows.inner_text())
    until(lambda: "the same" in page.locator("#compare .first").inner_text())
    page.fill("#right-from", "2")
    until(lambda: "0 gained, 0 lost" in page.inner_text("#summary"))


def test_the_same_question_in_another_step(page, runs):
    """many has its questions again every 50 steps only; a step of `many` leads to none, so the link is not there."""
    go(page, "rollouts")
    page.select_option("#run", label="many")
    page.wait_for_selector("#rollouts .card")
    assert page.get_by_text("the same question in step").count() == 0


def test_saving_the_page_and_opening_the_file_without_network(address, new_page, tmp_path):
    """Through the link on the page; the runs that are not chosen stay out of the file."""
    page = new_page()
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    page.locator(".runs input").nth(2).uncheck()
    until(lambda: page.locator("#export").get_attribute("href").endswith("runs=0,1"))
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "saved.html"
    download.value.save_as(path)
    offline = new_page(offline=True)
    offline.goto(path.as_uri())
    offline.wait_for_selector("html[data-ready]")
    assert offline.locator(".runs tbody th").all_inner_texts() == ["after", "before"]
    assert "Nothing was left out" in offline.inner_text("#notes")
    go(offline, "rollouts")
    until(lambda: count(offline) == "3 groups, 6 of 6 completions")


def test_a_run_that_is_being_written(viewer, new_page, tmp_path):
    """New rows appear without a reload, a half line waits, and a file that was cut is read anew."""
    folder = tmp_path / "live"
    write_small_run(folder, [answer(1, 0, "q", "first", 1.0)], {})
    file = folder / "rollouts-rank0.jsonl"
    page = new_page()
    page.goto(viewer(tmp_path) + "#rollouts")
    page.wait_for_selector("html[data-ready]")
    until(lambda: count(page) == "1 groups, 1 of 1 completions")
    line = json.dumps(answer(2, 0, "q", "second", 0.0)) + "\n"
    with file.open("a") as out:
        out.write(line[:30])
        out.flush()
        time.sleep(3.5)
        assert count(page) == "1 groups, 1 of 1 completions"
        out.write(line[30:])
    until(lambda: count(page) == "2 groups, 2 of 2 completions")
    file.write_text(json.dumps(answer(1, 0, "q", "another first, longer", 1.0)) + "\n")
    until(lambda: count(page) == "1 groups, 1 of 1 completions")
    until(lambda: "another first, longer" in page.locator("#rollouts .detail").inner_text())  # not the text of before
    os.mkdir(tmp_path / "new")
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.1}\n')
    go(page, "overview")
    until(lambda: page.locator(".runs tbody th").all_inner_texts() == ["live", "new"], 15)


@pytest.mark.parametrize("settings, groups", [({"num_generations": 2}, 2), ({}, 1)], ids=["known", "unknown"])
def test_two_prompts_of_a_step_may_have_one_question(viewer, new_page, tmp_path, settings, groups):
    """Multiple choice: the question is the same, its options are not. Without the settings the text is all there is."""
    write_small_run(tmp_path / "r", [answer(1, row, "Which is right?", "A", row / 4) for row in range(4)], settings)
    page = new_page()
    page.goto(viewer(tmp_path) + "#rollouts")
    page.wait_for_selector("html[data-ready]")
    until(lambda: count(page) == f"{groups} groups, 4 of 4 completions")


def test_a_run_without_completions_shows_its_first_one(viewer, new_page, tmp_path):
    """The page was open before it was written; then held-out answers come, and the choice of them appears."""
    folder = tmp_path / "live"
    write_small_run(folder, [], {})
    page = new_page()
    page.goto(viewer(tmp_path) + "#rollouts")
    page.wait_for_selector("html[data-ready]")
    until(lambda: "no logged completions" in page.inner_text("#rollouts"))
    with (folder / "rollouts-rank0.jsonl").open("a") as out:
        out.write(json.dumps(answer(1, 0, "q", "first", 1.0)) + "\n")
    until(lambda: page.locator("#count").count() and count(page) == "1 groups, 1 of 1 completions", 15)
    assert page.locator("#of").count() == 0
    (folder / "held_out-rank0.jsonl").write_text(json.dumps(answer(1, 0, "h", "held", 1.0)) + "\n")
    until(lambda: page.locator("#of").count() == 1, 15)


def test_only_the_rows_on_the_screen_exist(viewer, new_page, tmp_path):
    """20,000 completions: the page holds dozens of rows, asks for few texts, and reaches the last row."""
    write_run(tmp_path / "run", 20_000, 60)
    page = new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/api/texts" in request.url else None)
    page.goto(viewer(tmp_path) + "#rollouts")
    page.wait_for_selector("html[data-ready]")
    page.select_option("#mode", "rows")
    until(lambda: count(page) == "20,000 of 20,000 completions")
    rows = page.locator("#rollouts .list-row")
    node = page.locator("#rollouts .list")
    for share in (0.1, 0.35, 0.6, 0.99, 1.0):
        node.evaluate("(node, share) => { node.scrollTop = share * node.scrollHeight; }", share)
        until(
            lambda: (
                rows.count() > 5 and not any(text.endswith("…") and len(text) < 60 for text in rows.all_inner_texts())
            )
        )
        assert rows.count() < 40
    page.wait_for_selector("#rollouts .list-row[data-index='19999']")
    assert len(asked) < 25


@pytest.fixture(scope="module")
def hostile_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    write_hostile_run(root / "<img src=x onerror=harmed=1>")
    return root


@pytest.mark.parametrize("where", ["server", "file"])
def test_hostile_texts_are_shown_and_do_nothing(where, viewer, hostile_root, new_page, tmp_path):
    """The page holds the very text, and no element, script, request, dialog or overflow that it did not have before."""
    if where == "file":
        path = tmp_path / "report.html"
        export(hostile_root, path)
        address = path.as_uri()
    else:
        address = viewer(hostile_root)
    page = new_page(offline=where == "file")
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    page.get_by_text("all settings").click()
    unharmed(page)
    go(page, "rollouts")
    page.select_option("#mode", "rows")
    page.click("#direction")
    until(lambda: count(page) == f"{len(TEXTS)} of {len(TEXTS)} completions")
    for row, (name, text) in enumerate(TEXTS.items()):
        page.locator("#rollouts .list").focus()
        page.keyboard.press("Home")
        for _ in range(row):
            page.keyboard.press("ArrowDown")
        card = page.locator(f"#rollouts .card.chosen[data-row='{row}']")
        card.wait_for()
        shown = card.locator(".body .text").first.text_content()
        for letter in ("<", "数", "العربية", "red", "lone"):
            assert shown.count(letter) >= min(1, text[:20000].count(letter)), name
        assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", shown), name
        if name in ("script", "handler", "end of the data block", "link", "template", "mixed", "combining"):
            assert shown == text, name
        if name == "right to left":
            assert "U+202E" in shown and "שלום" in shown
        if name == "wide":
            assert len(shown) < 25_000 and "980,000 of 1,000,000 characters left" in shown
            card.locator(".more").first.click()
            assert len(card.locator(".body .text").first.text_content()) > 115_000
        if card.locator("select.shade").count():
            card.locator("select.shade").select_option("logprob")
        unharmed(page)
    go(page, "compare")
    page.wait_for_selector("#compare .card")
    unharmed(page)


def unharmed(page) -> None:
    found = page.evaluate(
        """() => ({harmed: String(window.harmed), title: document.title,
            bad: document.querySelectorAll(
                'main img, main script, main svg [onload], main a, main iframe, main style').length,
            wide: document.documentElement.scrollWidth - document.documentElement.clientWidth})"""
    )
    assert found == {"harmed": "undefined", "bad": 0, "wide": 0, "title": "grpo runs"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1600])
def test_any_width_and_theme(address, new_page, width, scheme):
    """Nothing is wider than the window, and texts stand out from their ground by the contrast that WCAG AA asks."""
    page = new_page(width=width, color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    for view in ("overview", "rollouts", "compare"):
        go(page, view)
        page.wait_for_selector(
            {"overview": ".chart path", "rollouts": "#rollouts .card", "compare": "#compare .card"}[view]
        )
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
    for variable in ("--ink", "--quiet", "--accent", "--warn", "--good"):
        assert contrast(page, variable, "--panel") >= 4.5, variable
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 384


def contrast(page, ink: str, ground: str) -> float:
    """Contrast of two colours of the style sheet, by WCAG 2's formula."""
    colours = page.evaluate(
        """names => names.map(name => { const node = document.createElement('span'); document.body.append(node);
        node.style.color = `var(${name})`; const found = getComputedStyle(node).color; node.remove();
        return found; })""",
        [ink, ground],
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted(map(luminance, colours), reverse=True)
    return (high + 0.05) / (low + 0.05)
