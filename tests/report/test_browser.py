"""The page in a real browser: Debian's `chromium` and `chromium-driver`, driven by selenium.

Both are named by their paths, so that nothing is downloaded. Without them these tests skip.
"""

import shutil
import time

import numpy as np
import pytest

from qs_jax import report
from tests.report.support import LAYERS
from tests.report.test_page import ODD

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]
TOKEN = 20


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{option}")
    options.add_argument("--window-size=1300,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = chromium
    service = webdriver.ChromeService(executable_path=driver)
    running = webdriver.Chrome(options=options, service=service)
    yield running
    running.quit()


class Browser:
    """A page, freshly opened."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get_log("browser")
        self.scheme("light")
        driver.get(path.as_uri())
        self.wait("document.body.dataset.ready === 'yes'")

    def scheme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script, *args):
        return self.driver.execute_script(f"return {script}", *args)

    def wait(self, expression, seconds=20):
        until = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        """Text of every element that a selector finds."""
        script = "[...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return self.run(script, selector)

    def pixels(self, canvas):
        return self.run("arguments[0].toDataURL()", self.find(canvas))


@pytest.fixture
def page(driver, whole, tmp_path):
    """A page with everything in it; no test may leave an error in the console."""
    yield Browser(driver, report.write(whole, tmp_path / "report.html"))
    assert driver.get_log("browser") == []


def test_the_slider_moves_and_shows_the_numbers_of_the_record(page, case):
    before = page.pixels("#timeline-a")
    page.find(f"#a{TOKEN}").click()
    slide = "arguments[0].value = arguments[1], arguments[0].dispatchEvent(new Event('input'))"
    for layer in (1, 4, LAYERS):
        page.run(slide, page.find("#layer"), layer)
        page.wait(f"document.querySelector('#layer-value').textContent.startsWith('{layer} ')")
        page.wait(f"document.querySelector('#detail').textContent.includes('layer {layer}')")
        cells = iter(page.texts("#detail tbody tr > *"))
        shown = {name: values for name, *values in zip(cells, cells, cells, strict=True)}
        for side, run in enumerate((case.run("HKFQ"), case.run(""))):
            record, at = run.record, (layer - 1, 0, TOKEN)
            assert shown["bits"][side] == str(record.bits[at])
            assert shown["keys it saw"][side] == str(record.visible_keys[at])
            assert shown["layers before it halted"][side] == str(record.depth[0, TOKEN])
            assert shown["runs this layer"][side] == ("yes" if record.active[at] else "no")
            drift = shown["relative drift"][side]
            if record.active[at]:
                expected = run.signals["drift"][layer - 1, TOKEN]
                assert float(drift) == pytest.approx(expected, rel=5e-3)
            else:
                assert drift == "\u2013"
            logprob = float(shown["log-probability, nats"][side])
            assert logprob == pytest.approx(run.logprobs[TOKEN], rel=5e-3)
    assert page.pixels("#timeline-a") != before


def test_keys_move_over_tokens_and_layers(page, case):
    from selenium.webdriver.common.keys import Keys

    canvas = page.find("#timeline-a")
    canvas.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    page.wait(f"document.querySelector('#detail').textContent.includes('layer {LAYERS - 1}')")
    assert page.find("#detail div").text.startswith("token 2 ")
    page.find("#text-b").send_keys(Keys.END)
    last = len(case.ids) - 1
    page.wait(f"document.querySelector('#text-b').ariaActiveDescendantElement?.id === 'b{last}'")
    page.find("#layer").send_keys(Keys.ARROW_LEFT)
    page.wait(f"document.querySelector('#layer').value === '{LAYERS - 2}'")


@pytest.mark.parametrize("name", ["timeline", "kv", "bits", "fusion"])
def test_hovering_shows_the_cell_under_the_pointer(page, case, name):
    from selenium.webdriver import ActionChains

    canvas = page.find(f"#{name}-a")
    page.run("arguments[0].scrollIntoView({block: 'center'})", canvas)
    box = canvas.rect
    # The map begins 34 pixels from the left; offsets count from the middle.
    cell = (box["width"] - 38) / len(case.ids)
    across = 34 + (TOKEN + 0.5) * cell - box["width"] / 2
    down = box["height"] * 0.1 - box["height"] / 2
    move = ActionChains(page.driver)
    move.move_to_element_with_offset(canvas, round(across), round(down)).perform()
    page.wait("!document.querySelector('#tip').hidden")
    tip = page.find("#tip").text
    assert f"token {TOKEN} " in tip
    layer = int(tip.split("layer ")[1].split()[0])
    assert layer in (LAYERS, LAYERS - 1)
    record = case.run("HKFQ").record
    assert f"bits: {record.bits[layer - 1, 0, TOKEN]}\n" in tip
    assert f"keys it saw: {record.visible_keys[layer - 1, 0, TOKEN]}\n" in tip
    ActionChains(page.driver).move_to_element(page.find("h1")).perform()
    page.wait("document.querySelector('#tip').hidden")


def test_switches_change_what_is_compared(page, case):
    title = "document.querySelectorAll('#kv figcaption')[1].textContent"
    names = ["tiny: halting, KV skipping, fusion, quantization", "dense model"]
    assert page.texts("#kv figcaption") == names
    before, kv = page.texts("#compare td:nth-child(3)"), page.pixels("#kv-b")
    page.find("#K-b").click()  # KV skipping brings halting along
    page.wait(f"{title}.includes('skipping')")
    assert page.find("#H-b").is_selected()
    time.sleep(0.1)
    run, after = case.run("HK"), page.texts("#compare td:nth-child(3)")
    assert after != before
    assert float(after[0]) == pytest.approx(run.perplexity, rel=1e-3)
    assert after[3] == str((run.record.depth < LAYERS).sum())
    assert page.pixels("#kv-b") != kv
    page.find("#H-b").click()  # and goes with it
    page.wait(f"{title} === 'dense model'")
    assert not page.find("#K-b").is_selected()


def test_charts_show_the_numbers_of_runs_and_files(page, case, whole):
    fit = f"N = {whole.results[0]['decay']['start']:.1f}, "
    assert fit in page.texts("#decay-chart .legend")[0]
    assert fit in page.texts("#results-chart .legend")[0]
    assert "τ drift" in page.texts("#drift-chart .legend")[0]
    active = case.run("HKFQ").record.active.sum((1, 2))
    rows = page.texts("#decay-chart tbody td:nth-child(2)")
    assert rows == [str(count) for count in active]
    exact = sum(whole.results[0]["costs"].values())
    assert float(page.texts("#cost-chart td")[-2].split()[-1]) == pytest.approx(
        exact / 1e9, rel=1e-3
    )
    assert len(page.texts("#front-chart .mark")) == 2  # one of three points is beyond the axis


def test_both_colour_schemes_and_a_narrow_window(page):
    def brightness(property):
        color = page.run(f"getComputedStyle(document.body).{property}")
        return np.mean([int(part) for part in color[4:-1].split(",")])

    assert brightness("backgroundColor") - brightness("color") > 150
    light = page.pixels("#bits-a")
    page.scheme("dark")
    time.sleep(0.3)
    assert brightness("color") - brightness("backgroundColor") > 150
    assert page.pixels("#bits-a") != light
    metrics = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    time.sleep(0.3)
    width = page.run("document.documentElement.scrollWidth")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 420, "the page must not scroll sideways"


def test_odd_text_is_shown_as_it_is(driver, case, tmp_path):
    labels = (ODD * len(case.ids))[: len(case.ids)]
    page = Browser(driver, report.write(case.report(labels), tmp_path / "odd.html"))
    assert page.texts("#text-a span") == labels
    assert page.texts("#text-a b, #text-a script") == []
    assert driver.get_log("browser") == []
