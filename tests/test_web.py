"""The playground and /docs in a real browser, against a real server with tiny models.

Every page of every test is watched: an error in the console, a breach of the Content-Security-Policy
or a request to anywhere but the server fails the test. Waiting is polling from here: what polls
inside a page needs `eval`, which the policy forbids.
"""

import json
import os
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_serve import Gate, byte_student, client, eventually, running, tiny_service

from mdm.serve.schemas import DIFFUSION_ONLY

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
KEY = "k" * 12
HTML = '<img src=x onerror="window.ran=1"><script>window.ran=1</script><b>&amp;</b>'
WATCH = """
window.breaches = [];
document.addEventListener("securitypolicyviolation",
    (event) => window.breaches.push(event.violatedDirective + " " + event.blockedURI));
"""


@pytest.fixture(scope="module")
def browser():
    """One headless browser for all tests of this file."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = f"no browser: none of {', '.join(BROWSERS)} is on the PATH"
        if os.environ.get("MDM_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """`visit(url, path="/", refused=(), **context)` opens a watched page, ready for use.

    `refused`: statuses the server is meant to answer with; the console tells of each of them.
    """
    contexts, watched = [], []

    def open_page(url, path="/", *, refused=(), **options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        context.add_init_script(WATCH)
        contexts.append(context)
        page = context.new_page()
        seen = SimpleNamespace(page=page, url=url, refused=refused, errors=[], requests=[])
        watched.append(seen)
        page.on("console", lambda line: seen.errors.append(f"{line.type}: {line.text}"))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(url + path)
        if path == "/" and 401 not in refused:
            page.locator("#model option").first.wait_for(state="attached")
        return page

    yield open_page
    for seen in watched:
        breaches = seen.page.evaluate("window.breaches")
        assert breaches == []
        told = [f"the server responded with a status of {status}" for status in seen.refused]
        unexpected = [line for line in seen.errors if not any(text in line for text in told)]
        assert unexpected == []
        assert seen.requests
        assert [one for one in seen.requests if not one.startswith(seen.url + "/")] == []
    for context in contexts:
        context.close()


@pytest.fixture
def gated():
    """A service whose student waits at the gate before every forward, and its address."""
    service = tiny_service(teacher=True)
    gate = Gate(service)
    with running(service) as url:
        yield SimpleNamespace(service=service, gate=gate, url=url)
        gate.open()


@pytest.fixture(scope="module")
def served():
    """A service with student and teacher that runs freely, and its address."""
    service = tiny_service(teacher=True)
    with running(service) as url:
        yield SimpleNamespace(service=service, url=url)


def cells(page, kind="cell"):
    return page.locator(f"#canvas .{kind}").count()


def text_of(page, selector):
    return page.locator(selector).evaluate("(element) => element.textContent")


def focused(page):
    return page.evaluate("document.activeElement.id")


def value_of(page, selector):
    return page.locator(selector).input_value()


def await_text(page, selector, expected):
    eventually(lambda: expected in text_of(page, selector), f"{expected!r} in {selector}")


def await_end(page):
    """Until the request is over and its replay has been loaded."""
    await_text(page, "#status", "Finished")
    eventually(lambda: page.locator("#stop-button").is_disabled(), "the request is over")


def speaking(text, start):
    """A student that always says this text in a hole that starts at this position."""
    student = byte_student()
    said = text.encode()

    def forward(xt_BL, wanted_BL, **_):
        places = wanted_BL.nonzero()[:, 1] - start
        logits_NV = torch.zeros(len(places), len(student.vocab))
        for row, place in enumerate(places.tolist()):
            logits_NV[row, said[place] if 0 <= place < len(said) else ord(" ")] = 9.0
        logits_NV[:, student.mask_id] = float("-inf")
        return logits_NV

    student.rows, student.head = forward, lambda logits_NV: logits_NV
    return student


# --- filling ---------------------------------------------------------------------------------------


def test_cells_fill_one_forward_after_the_other(gated, visit):
    page = visit(gated.url)
    page.click("#run")
    for done in range(3):
        gated.gate.wait()
        eventually(lambda done=done: cells(page, "filled") == done, f"{done} cells filled")
        assert cells(page, "masked") == 3 - done
        eventually(
            lambda done=done: (
                text_of(page, "#counter") == f"step {done} of {done}, {3 - done} open"
            ),
            "the counter follows",
        )
        gated.gate.let()
    await_end(page)
    assert (cells(page, "filled"), cells(page, "masked")) == (3, 0)
    label = page.locator("#canvas .filled").first.get_attribute("aria-label")
    assert "token 1 of 3" in label
    assert "confidence 0." in label
    assert "step " in label
    assert page.locator("#canvas .filled").first.get_attribute("title") == label
    assert page.locator("#canvas .filled").first.evaluate(
        "(cell) => parseFloat(cell.style.getPropertyValue('--confidence')) / 100"
    ) == pytest.approx(float(label.split("confidence ")[1].split(",")[0]), abs=0.006)


@pytest.mark.parametrize(
    "mode",
    [
        {"prefix": "x = [", "suffix": "]\n\n", "span": 12},
        {"prompt": "def f(", "gen_length": 10},
    ],
    ids=["hole", "prompt"],
)
def test_text_and_settings_are_those_of_the_api(served, visit, mode):
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "steps": 5, "remasking": "margin"}
    settings = settings | {"cfg_scale": 0.5, "stop": ["\\", "\n\n", "qq"]}
    with client(served.url) as http:
        expected = http.post("/generate", json={**mode, **settings}).raise_for_status().json()
    page = visit(served.url)
    sent = []
    page.on("request", lambda request: sent.append(request))
    page.click("#tab-hole" if "span" in mode else "#tab-continue")
    page.click("#settings summary")
    for name, value in {**mode, **settings, "stop": "\\\\\n\\n\\n\nqq"}.items():
        if name == "remasking":
            page.select_option("#remasking", value)
        else:
            page.fill(f"#{name}", str(value))
    page.click("#run")
    await_end(page)
    streaming = {"model": "tiny", "stream": True, "denoising": True}
    posted = [request for request in sent if request.method == "POST"]
    assert [request.post_data_json for request in posted] == [{**mode, **settings, **streaming}]
    assert text_of(page, "#text") == expected["choices"][0]["text"]
    stats = text_of(page, "#stats")
    assert f"Tokens{expected['completion_tokens']}Tokens a second" in stats
    assert f"Forwards{expected['stats']['forwards']['denoise']} denoise" in stats
    assert "MiB" in stats
    assert cells(page) == mode.get("span", mode.get("gen_length"))


@pytest.mark.parametrize(
    "settings",
    [
        {"factor": 20, "cfg_scale": 0.5},
        {"entropy_bound": 9.5, "remasking": "entropy"},
        {"threshold": 0.01, "remasking": "margin"},
    ],
    ids=str,
)
def test_rules_are_sent_and_kept(served, visit, settings):
    with client(served.url) as http:
        body = {"prompt": "def f(", "gen_length": 10, **settings, "temperature": 0.5, "seed": 3}
        expected = http.post("/generate", json=body).raise_for_status().json()
    page = visit(served.url)
    page.click("#tab-continue")
    page.click("#settings summary")
    for name, value in body.items():
        if name == "remasking":
            page.select_option("#remasking", value)
        else:
            page.fill(f"#{name}", str(value))
    with page.expect_request("**/generate") as sent:
        page.click("#run")
    await_end(page)
    streaming = {"model": "tiny", "stream": True, "denoising": True}
    assert sent.value.post_data_json == body | streaming
    assert text_of(page, "#text") == expected["choices"][0]["text"]


def test_an_approximate_cache_is_sent(served, visit):
    page = visit(served.url, refused=[400])
    page.click("#settings summary")
    page.fill("#refresh", "3")
    page.click("#run")
    await_text(page, "#error", "refresh=3 is for an approximate cache; choose cache=prefix")
    page.select_option("#cache", "dual")
    page.fill("#factor", "1")
    page.fill("#steps", "3")  # refused whatever the cache
    with page.expect_request("**/generate") as sent:
        page.click("#run")
    await_text(page, "#error", "factor decides how many steps there are; leave steps out")
    assert sent.value.post_data_json.items() >= {"cache": "dual", "refresh": 3}.items()


def test_every_setting_of_diffusion_can_be_chosen_or_is_known_to_be_missing(served, visit):
    page = visit(served.url)
    names = page.evaluate("[...document.querySelectorAll('#diffusion [name]')].map((f) => f.name)")
    left_out = {"suppress_eos", "eos_last", "stop_at_eos"}
    assert {*names} | left_out == {*DIFFUSION_ONLY}


def test_empty_fields_are_not_sent(served, visit):
    page = visit(served.url)
    with page.expect_request("**/generate") as sent:
        page.click("#run")
    assert sent.value.post_data_json == {
        "prefix": "def add(a, b):\n    total = ",
        "suffix": "\n    return total",
        "span": 3,
        "model": "tiny",
        "stream": True,
        "denoising": True,
    }
    await_end(page)


def test_white_space_can_be_seen_in_cells_and_copied_as_it_is(visit):
    said = "a \n\tb"
    service = tiny_service(student=speaking(said, 1 + len("x")))
    with running(service) as url:
        page = visit(url, permissions=["clipboard-read", "clipboard-write"])
        page.fill("#prefix", "x")
        page.fill("#suffix", "y")
        page.fill("#span", str(len(said)))
        page.click("#run")
        await_end(page)
        # A line break is marked and also breaks the line.
        shown = page.locator("#canvas .filled").all_text_contents()
        assert shown == ["a", "·", "⏎\n", "⇥", "b"]
        tops = page.locator("#canvas .filled").evaluate_all(
            "(cells) => [0, 4].map((i) => cells[i].getBoundingClientRect().top)"
        )
        assert tops[1] > tops[0]
        assert text_of(page, "#canvas").replace("\u200b", "") == "xa·⏎\n⇥by"
        assert text_of(page, "#text") == said
        page.click("#copy")
        await_text(page, "#status", "Copied")
        assert page.evaluate("navigator.clipboard.readText()") == said


def test_a_model_or_a_prompt_cannot_write_html(visit):
    service = tiny_service(student=speaking(HTML, 1 + len(HTML)))
    with running(service) as url:
        page = visit(url)
        page.fill("#prefix", HTML)
        page.fill("#suffix", HTML)
        page.fill("#span", str(len(HTML)))
        page.click("#run")
        await_end(page)
        assert text_of(page, "#text") == HTML
        assert (
            "".join(page.locator("#canvas .filled").all_text_contents()).replace("·", " ") == HTML
        )
        assert page.locator("#canvas .given").all_text_contents() == [HTML, HTML]
        assert page.locator("img[src=x], .answer b, .answer script").count() == 0
        assert page.evaluate("window.ran") is None


# --- replay ----------------------------------------------------------------------------------------


def test_scrubber_replays_every_step(served, visit):
    page = visit(served.url)
    page.fill("#span", "6")
    page.click("#settings summary")
    page.fill("#steps", "3")
    with page.expect_response("**/trajectory") as kept:
        page.click("#run")
    await_end(page)
    steps = kept.value.json()["rows"][0]["steps"]
    assert [len(step["positions"]) for step in steps] == [2, 2, 2]
    scrubber = page.locator("#scrubber")
    scrubber.focus()
    page.keyboard.press("Home")
    assert (cells(page, "masked"), text_of(page, "#counter")) == (6, "step 0 of 3, 6 open")
    for number, step in enumerate(steps, start=1):
        page.keyboard.press("ArrowRight")
        counter = f"step {number} of 3, {6 - 2 * number} open"
        assert text_of(page, "#counter") == counter
        assert scrubber.get_attribute("aria-valuetext") == counter
        labels = [page.locator("#canvas .cell").nth(at).get_attribute("title") for at in range(6)]
        filled = [at for at, label in enumerate(labels) if not label.endswith("open")]
        assert set(step["positions"]) <= set(filled)
        assert len(filled) == 2 * number
        assert all(f"step {number}," in labels[at] for at in step["positions"])
    page.keyboard.press("ArrowLeft")
    assert text_of(page, "#counter") == "step 2 of 3, 2 open"
    page.click("#previous")
    assert text_of(page, "#counter") == "step 1 of 3, 4 open"
    page.click("#next")
    page.click("#next")
    assert (cells(page, "filled"), cells(page, "masked")) == (6, 0)
    page.click("#play")  # from the beginning, as it stood at the end
    eventually(lambda: cells(page, "masked") > 0, "it plays")
    await_text(page, "#counter", "step 3 of 3, 0 open")
    eventually(lambda: "Play" in text_of(page, "#play"), "it stops at the end")


def test_replay_without_the_servers_record(visit):
    with running(tiny_service(trajectories=0)) as url:
        page = visit(url, refused=[404])
        page.click("#run")
        await_text(page, "#status", "keeps no replays")
        assert text_of(page, "#counter") == "step 3 of 3, 0 open"
        page.click("#previous")
        assert cells(page, "masked") == 1


def test_an_earlier_step_stays_in_view_while_the_model_goes_on(gated, visit):
    page = visit(gated.url)
    page.click("#run")
    gated.gate.let(2)
    await_text(page, "#counter", "step 2 of 2")
    page.click("#previous")
    gated.gate.open()
    await_end(page)
    assert text_of(page, "#counter") == "step 1 of 3, 2 open"


def test_cells_are_read_with_the_keyboard(served, visit):
    page = visit(served.url)
    page.click("#run")
    await_end(page)
    page.locator("#canvas .cell").first.focus()
    page.keyboard.press("ArrowRight")
    assert text_of(page, "#cell-info").startswith("token 2 of 3: ")
    page.keyboard.press("End")
    assert text_of(page, "#cell-info").startswith("token 3 of 3: ")


# --- stopping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_cancels_on_the_server(gated, visit, how):
    page = visit(gated.url)
    page.click("#run")
    gated.gate.let()
    await_text(page, "#counter", "step 1 of 1, 2 open")
    assert gated.service.engine.rows_in_work == 1
    if how == "button":
        page.click("#stop-button")
        assert focused(page) == "run"
    else:
        page.keyboard.press("Escape")
    await_text(page, "#status", "Stopped")
    (job,) = gated.service.engine._jobs
    eventually(lambda: job.cancelled, "the server notices")
    gated.gate.let()  # the forward that was under way ends
    eventually(lambda: gated.service.engine.rows_in_work == 0, "the server gives the row up")
    assert len(gated.gate.seen) <= 3  # the first, the one under way, one that had begun already
    assert text_of(page, "#counter") == "step 1 of 1, 2 open"
    gated.gate.open()
    page.keyboard.press("Control+Enter")
    await_end(page)
    assert cells(page, "filled") == 3


# --- compare ---------------------------------------------------------------------------------------


def test_compare_with_the_teacher(served, visit):
    page = visit(served.url)
    page.click("#settings summary")
    page.fill("#seed", "5")
    page.fill("#steps", "1")
    with page.expect_response("**/compare") as answered:
        page.click("#compare")
    await_text(page, "#status", "Compared")
    answer = answered.value.json()
    texts = [
        page.locator("#comparison pre").nth(at).evaluate("(e) => e.textContent") for at in (0, 1)
    ]
    assert texts == [answer[who]["choices"][0]["text"] for who in ("student", "teacher")]
    assert answer["teacher"]["left_only"] is True
    assert page.locator("#comparison .note").all_text_contents() == [
        "ar saw only the text before the hole."
    ]
    table = text_of(page, "#comparison table")
    assert f"Tokens a forward3.001.00{answer['ratio']['tokens_per_forward']:.2f}\u00a0×" in table
    assert "Forwards1 denoise1 prefill, 2 decode" in table


def test_no_teacher_no_comparison(visit):
    with running(tiny_service()) as url:
        page = visit(url)
        assert "parameters" in text_of(page, "#model-info")
        assert page.locator("#compare").is_hidden()


def test_the_teacher_alone_gets_no_settings_of_diffusion(served, visit):
    page = visit(served.url)
    page.click("#tab-continue")
    page.click("#settings summary")
    page.fill("#steps", "4")
    page.select_option("#model", "ar")
    assert page.locator("#steps").is_disabled()
    assert "sees the text before a hole only" in text_of(page, "#model-info")
    page.click("#run")
    await_end(page)
    assert "1 prefill, 23 decode" in text_of(page, "#stats")


# --- errors and keys -------------------------------------------------------------------------------


def test_an_error_is_told_and_its_field_focused(served, visit):
    page = visit(served.url, refused=[400])
    page.fill("#span", "0")
    page.focus("#run")
    page.click("#run")
    await_text(page, "#error", "span: Input should be greater than or equal to 1")
    assert page.locator("#error").get_attribute("role") == "alert"
    assert focused(page) == "span"
    assert page.locator("#span").get_attribute("aria-invalid") == "true"
    page.fill("#span", "3")
    assert page.locator("#settings[open]").count() == 0
    page.locator("#top_p").evaluate("(field) => { field.value = '1.5'; }")
    page.keyboard.press("Control+Enter")
    await_text(page, "#error", "top_p: Input should be less than or equal to 1")
    assert focused(page) == "top_p"  # and the settings have opened
    page.fill("#top_p", "1")
    page.keyboard.press("Control+Enter")
    await_end(page)
    assert text_of(page, "#error") == ""
    assert page.locator("[aria-invalid]").count() == 0


def test_a_seed_that_would_be_rounded_is_refused(served, visit):
    page = visit(served.url)
    page.click("#settings summary")
    page.fill("#seed", str(2**53 + 1))
    page.click("#run")
    await_text(page, "#error", f"seed can be at most {2**53 - 1}")
    assert focused(page) == "seed"


def test_an_error_within_a_stream(gated, visit):
    page = visit(gated.url)
    page.click("#run")
    gated.gate.let()
    await_text(page, "#counter", "step 1 of 1")

    def broken(*_, **__):
        raise RuntimeError("broken on purpose")

    gated.service.student.model.rows = broken
    gated.gate.let()  # the forward that waits already; the next one fails
    await_text(page, "#error", "the server failed on this request (RuntimeError)")
    assert text_of(page, "#status") == "Failed."
    assert page.locator("#stop-button").is_disabled()


def test_the_key_is_asked_for_and_kept_in_the_tab(visit):
    with running(tiny_service(teacher=True), keys=[KEY]) as url:
        page = visit(url, refused=[401])
        await_text(page, "#error", "a valid API key is needed")
        assert focused(page) == "api-key"
        assert page.locator("#api-key").get_attribute("type") == "password"
        page.keyboard.type("not the key")
        page.keyboard.press("Enter")
        await_text(page, "#error", "no spaces")
        page.fill("#api-key", "wrong-" + KEY)
        page.keyboard.press("Enter")
        await_text(page, "#error", "a valid API key is needed")
        page.fill("#api-key", KEY)
        page.keyboard.press("Enter")
        await_text(page, "#status", "The key fits")
        assert text_of(page, "#error") == ""
        assert page.locator("#key-form").is_hidden()
        page.keyboard.press("Control+Enter")
        await_end(page)
        assert page.evaluate("sessionStorage.getItem('mdm-api-key')") == KEY
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.goto(url + "/docs")  # reads /openapi.json with the same key
        page.locator(".endpoint").first.wait_for()
        assert "authorization: Bearer $MDM_API_KEY" in text_of(page, "#reference")
        assert KEY not in text_of(page, "body")


# --- keyboard, widths, colours ---------------------------------------------------------------------


def test_keyboard_alone(gated, visit):
    page = visit(gated.url)
    page.focus("#tab-hole")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "tab-continue"
    assert page.locator("#panel-continue").is_visible()
    assert page.locator("#panel-hole").is_hidden()
    page.keyboard.press("Home")
    assert focused(page) == "tab-hole"
    reached = []
    while focused(page) != "run" and len(reached) < 20:
        page.keyboard.press("Tab")
        reached.append(focused(page))
    assert reached[:3] == ["prefix", "span", "suffix"]
    assert reached[-1] == "run"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    gated.gate.wait()
    await_text(page, "#status", "Denoising")
    page.keyboard.press("Tab")
    assert focused(page) == "stop-button"
    page.keyboard.press("Escape")
    await_text(page, "#status", "Stopped")
    assert focused(page) == "run"
    gated.gate.open()
    page.focus("#prefix")
    page.keyboard.press("Control+Enter")
    await_end(page)
    page.locator("#reuse-seed").focus()
    page.keyboard.press("Enter")
    assert value_of(page, "#seed") == text_of(page, "#reuse-seed")


def test_every_field_has_a_label(served, visit):
    for path in ("/", "/docs"):
        page = visit(served.url, path)
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea")]
                .filter((field) => !field.labels.length && !field.getAttribute("aria-label"))
                .map((field) => field.id)"""
        )
        assert unnamed == []


def test_no_sideways_scrolling_on_a_phone(served, visit):
    page = visit(served.url, viewport={"width": 360, "height": 700})
    page.click("#settings summary")
    page.fill("#prefix", "long_" * 60)
    page.fill("#span", "60")
    page.click("#run")
    await_end(page)
    page.click("#compare")
    await_text(page, "#status", "Compared")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.goto(served.url + "/docs")
    page.locator(".endpoint").first.wait_for()
    for summary in page.locator(".endpoint summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


CONTRASTS = """(selectors) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const drawn = (colours) => {  // as the eye gets it: one over the other, as sRGB
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => {
        const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    };
    return Object.fromEntries(selectors.map((selector) => {
        const element = document.querySelector(selector);
        const below = [];
        for (let node = element; node; node = node.parentElement)
            below.unshift(getComputedStyle(node).backgroundColor);
        const paper = drawn(below);
        const ink = drawn([...below, getComputedStyle(element).color]);
        const [a, b] = [luminance(ink), luminance(paper)].sort((x, y) => y - x);
        return [selector, paper[3] === 255 ? (a + 0.05) / (b + 0.05) : 0];
    }));
}"""


def test_contrast_in_light_and_dark(served, visit):
    papers = {}
    for scheme in ("light", "dark"):
        page = visit(served.url, color_scheme=scheme, reduced_motion="reduce", refused=[400])
        page.click("#run")
        await_end(page)
        page.fill("#span", "0")
        page.keyboard.press("Control+Enter")
        await_text(page, "#error", "span")
        wanted = ["body", ".dim", "label", "textarea", "#tab-continue", "#model-info", "#run"]
        wanted += ["#status", "#error", "#counter", ".given", "#text", "#stats th", "footer a"]
        found = page.evaluate(CONTRASTS, wanted)
        # Tokens from unsure to sure: the text and its dim marks on both ends of the colours.
        for percent in ("0%", "50%", "100%"):
            page.locator("#canvas .filled").first.evaluate(
                """(cell, percent) => {
                    cell.style.setProperty("--confidence", percent);
                    const mark = document.createElement("span");
                    mark.className = "mark";
                    cell.replaceChildren(mark);
                }""",
                percent,
            )
            for part in ("#canvas .filled", "#canvas .filled .mark"):
                found[f"{part} {percent}"] = page.evaluate(CONTRASTS, [part])[part]
        assert {name: round(ratio, 2) for name, ratio in found.items() if ratio < 4.5} == {}
        papers[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert papers["light"] != papers["dark"]


# --- the stream ------------------------------------------------------------------------------------


def test_events_are_found_however_they_are_cut(served, visit):
    page = visit(served.url)
    text = ': ping\r\n\r\ndata: {"a": 1}\n\nevent: x\r\ndata:one\r\ndata: two\r\n\r\n: c\n\ndata: é☕\r\r'
    found = page.evaluate(
        """async (text) => {
            const { EventParser } = await import("/web/sse.js");
            const results = [];
            for (let i = 0; i <= text.length; i++) {
                for (let j = i; j <= text.length; j++) {
                    const parser = new EventParser();
                    const parts = [text.slice(0, i), text.slice(i, j), text.slice(j)];
                    results.push(JSON.stringify(parts.flatMap((part) => parser.feed(part))));
                }
            }
            return [...new Set(results)].map((one) => JSON.parse(one));
        }""",
        text,
    )
    assert found == [['{"a": 1}', "one\ntwo", "é☕"]]


def test_a_stream_that_breaks_off_is_an_error(served, visit):
    page = visit(served.url)
    begun = 'data: {"id": "x", "model": "tiny", "seed": 1}\n\n'
    page.route(
        "**/generate",
        lambda route: route.fulfill(body=begun, content_type="text/event-stream"),
    )
    page.click("#run")
    await_text(page, "#error", "The answer broke off before its end")


# --- /docs -----------------------------------------------------------------------------------------


def test_docs_tell_of_every_endpoint(served, visit):
    with client(served.url) as http:
        api = http.get("/openapi.json").json()
    page = visit(served.url, "/docs")
    page.locator(".endpoint").first.wait_for()
    titles = page.locator(".endpoint h3").all_text_contents()
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()}{path}{operation['summary']}" in titles
    groups = {one["tags"][0] for methods in api["paths"].values() for one in methods.values()}
    assert set(page.locator(".group > h2").all_text_contents()) == groups
    generate = page.locator("#post-generate")
    fields = generate.locator("table").first.locator("tbody th").all_text_contents()
    assert fields == list(api["components"]["schemas"]["GenerateRequest"]["properties"])
    row = generate.locator("table").first.locator("tr", has_text="Denoising steps in total")
    assert row.locator("td").all_text_contents()[:2] == ["integer ≥ 1, ≤ 2^20 or null", "null"]
    assert page.locator("#reference").inner_text().count("[object") == 0


def test_a_curl_command_can_be_pasted(served, visit):
    page = visit(served.url, "/docs", permissions=["clipboard-read", "clipboard-write"])
    example = page.locator("#post-generate .example").first
    example.locator("button").click()
    await_text(page, "#status", "Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    words = [word for word in shlex.split(command) if word != "\n"]
    assert words[:4] == ["curl", f"{served.url}/generate", "-H", "content-type: application/json"]
    with client(served.url) as http:
        answer = http.post("/generate", json=json.loads(words[words.index("-d") + 1]))
    assert answer.status_code == 200
