"""The page in a real browser: Debian's `chromium` and `chromium-driver`, driven by selenium.

Both are asked for by their paths, so that nothing is downloaded; without them these tests skip.
"""

import shutil
import time

import numpy as np
import pytest

from qs_jax import report
from tests.report.support import LAYERS
from tests.report.test_page import ODD

pytestmark = pytest.mark.xdist_group("browser")
TOKEN, LAYER = 20, 4


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
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
    log = str(tmp_path_factory.mktemp("browser") / "driver.log")
    service = webdriver.ChromeService(executable_path=driver, log_output=log)
    running = webdriver.Chrome(options=options, service=service)
    yield running
    running.quit()


def scheme(driver, name):
    features = [{"name": "prefers-color-scheme", "value": name}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(driver, expression, seconds=20):
    until = time.monotonic() + seconds
    while not (found := driver.execute_script(f"return {expression}")):
        assert time.monotonic() < until, f"never true: {expression}"
        time.sleep(0.02)
    return found


def ready(driver, path):
    driver.get(path.as_uri())
    wait(driver, "document.body.dataset.ready === 'yes'")


@pytest.fixture
def opened(driver, case, tmp_path):
    """The page, freshly opened; no test may leave an error in the console."""
    path = report.write(case.report(), tmp_path / "report.html")
    driver.get_log("browser")
    scheme(driver, "light")
    ready(driver, path)
    yield driver
    assert driver.get_log("browser") == []


def find(driver, selector):
    return driver.find_element("css selector", selector)


def details(driver):
    """Numbers of the token under the cursor: {name: (run A, run B)}."""
    rows = driver.execute_script(
        "return [...document.querySelectorAll('#detail tbody tr')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    return {name: tuple(values) for name, *values in rows}


def set_layer(driver, layer):
    slider = find(driver, "#layer")
    driver.execute_script(
        "arguments[0].value = arguments[1];"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        slider,
        layer,
    )
    wait(driver, f"document.querySelector('#layer-value').textContent.startsWith('{layer} ')")


def pixels(driver, canvas):
    return driver.execute_script("return arguments[0].toDataURL()", find(driver, canvas))


@pytest.mark.slow
def test_the_slider_moves_and_shows_the_numbers_of_the_record(opened, case):
    run, dense = case.run("HKFQ"), case.run("")
    before = pixels(opened, "#timeline-a")
    opened.execute_script(f"document.querySelector('#a{TOKEN}').click()")
    for layer in (1, LAYER, LAYERS):
        set_layer(opened, layer)
        wait(opened, f"document.querySelector('#detail').textContent.includes('layer {layer}')")
        shown = details(opened)
        for side, each in enumerate((run, dense)):
            record, at = each.record, (layer - 1, 0, TOKEN)
            assert shown["bits"][side] == str(record.bits[at])
            assert shown["keys it saw"][side] == str(record.visible_keys[at])
            assert shown["layers before it halted"][side] == str(record.depth[0, TOKEN])
            assert shown["runs this layer"][side] == ("yes" if record.active[at] else "no")
            drift = each.signals["drift"][layer - 1, TOKEN]
            told = shown["relative drift"][side]
            if record.active[at]:
                assert float(told) == pytest.approx(drift, rel=5e-3)
            else:
                assert told == "\u2013"
            assert float(shown["log-probability, nats"][side]) == pytest.approx(
                each.logprobs[TOKEN], rel=5e-3
            )
    assert pixels(opened, "#timeline-a") != before


@pytest.mark.slow
def test_keys_move_over_tokens_and_layers(opened, case):
    from selenium.webdriver.common.keys import Keys

    canvas = find(opened, "#timeline-a")
    canvas.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    wait(opened, f"document.querySelector('#detail').textContent.includes('layer {LAYERS - 1}')")
    assert find(opened, "#detail div").text.startswith("token 2 ")
    words = find(opened, "#text-b")
    words.send_keys(Keys.END)
    last = len(case.ids) - 1
    wait(opened, f"document.querySelector('#text-b').ariaActiveDescendantElement?.id === 'b{last}'")
    layer = find(opened, "#layer")
    layer.send_keys(Keys.ARROW_LEFT)
    wait(opened, f"document.querySelector('#layer').value === '{LAYERS - 2}'")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timeline", "kv", "bits", "fusion"])
def test_hovering_shows_the_cell_under_the_pointer(opened, case, name):
    from selenium.webdriver import ActionChains

    canvas = find(opened, f"#{name}-a")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    box = canvas.rect
    # The map begins 34 pixels from the left; offsets count from the middle.
    cell = (box["width"] - 38) / len(case.ids)
    across = 34 + (TOKEN + 0.5) * cell - box["width"] / 2
    down = box["height"] * 0.1 - box["height"] / 2
    ActionChains(opened).move_to_element_with_offset(canvas, round(across), round(down)).perform()
    wait(opened, "!document.querySelector('#tip').hidden")
    told = opened.execute_script("return document.querySelector('#tip').innerText")
    assert f"token {TOKEN} " in told
    layer = int(told.split("layer ")[1].split()[0])
    assert layer in (LAYERS, LAYERS - 1)
    record = case.run("HKFQ").record
    assert f"bits: {record.bits[layer - 1, 0, TOKEN]}\n" in told
    assert f"keys it saw: {record.visible_keys[layer - 1, 0, TOKEN]}\n" in told
    ActionChains(opened).move_to_element(find(opened, "h1")).perform()
    wait(opened, "document.querySelector('#tip').hidden")


@pytest.mark.slow
def test_switches_change_what_is_compared(opened, case):
    def column(side):
        return [
            cell.text
            for cell in opened.find_elements("css selector", f"#compare td:nth-child({side + 2})")
        ]

    def captions():
        return [each.text for each in opened.find_elements("css selector", "#kv figcaption")]

    assert captions() == ["tiny: halting, KV skipping, fusion, quantization", "dense model"]
    before, kv = column(1), pixels(opened, "#kv-b")
    find(opened, "#K-b").click()  # KV skipping brings halting along
    wait(opened, "document.querySelector('#H-b').checked")
    wait(opened, "document.querySelectorAll('#kv figcaption')[1].textContent.includes('skipping')")
    time.sleep(0.1)
    run = case.run("HK")
    after = column(1)
    assert after != before
    assert float(after[0]) == pytest.approx(run.perplexity, rel=1e-3)
    assert after[3] == str((run.record.depth < LAYERS).sum())
    assert pixels(opened, "#kv-b") != kv
    find(opened, "#H-b").click()  # and goes with it
    wait(opened, "document.querySelectorAll('#kv figcaption')[1].textContent === 'dense model'")
    assert not find(opened, "#K-b").is_selected()


@pytest.mark.slow
def test_both_colour_schemes_and_a_narrow_window(opened):
    def look():
        return opened.execute_script(
            "const style = getComputedStyle(document.body);"
            "return [style.backgroundColor, style.color]"
        )

    def brightness(color):
        return np.mean([int(part) for part in color[4:-1].split(",")])

    paper, ink = map(brightness, look())
    assert paper - ink > 150
    light = pixels(opened, "#bits-a")
    scheme(opened, "dark")
    time.sleep(0.3)
    paper, ink = map(brightness, look())
    assert ink - paper > 150
    assert pixels(opened, "#bits-a") != light
    metrics = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    time.sleep(0.3)
    wide = opened.execute_script("return document.documentElement.scrollWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 420, "the page must not scroll sideways"


@pytest.mark.slow
def test_odd_text_is_shown_as_it_is(driver, case, tmp_path):
    labels = (ODD * len(case.ids))[: len(case.ids)]
    path = report.write(case.report(labels), tmp_path / "odd.html")
    driver.get_log("browser")
    ready(driver, path)
    shown = driver.execute_script(
        "return [...document.querySelectorAll('#text-a span')].map((span) => span.textContent)"
    )
    assert shown == labels
    assert (
        driver.execute_script(
            "return document.querySelectorAll('#text-a b, #text-a script').length"
        )
        == 0
    )
    assert driver.get_log("browser") == []
