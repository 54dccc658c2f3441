"""The page with live charts, in a real browser: what it shows, that it is safe, and that it says what it can't know."""

import contextlib
import shutil
import time

import pytest
import schoolhouse as sh
from loads import Running, fetch
from models import Net
from schoolhouse_server import serve
from schoolhouse_server.observe import web
from schoolhouse_server.observe.web import WebServer

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
FLAGS = (  # noqa: SIM905
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
DASH, MINUS = "-", "\u2212"
VISIBLE = "return document.getElementById('alert').checkVisibility()"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
browser_needed = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no chromium or no chromedriver here: apt-get install chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    found.set_page_load_timeout(90)
    yield found
    found.quit()


@pytest.fixture
def page(browser):
    """Opens a page of a source; what the browser complains of is an error, but for a server that went away."""

    @contextlib.contextmanager
    def opened(source, port=0):
        with WebServer(source, port=port) as server:
            browser.get_log("browser")
            browser.get(server.url)
            yield server

    yield opened
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert not [text for text in complaints if "api/panels" not in text]


def text(browser, selector):
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def until(browser, condition, *, within_s=60.0):
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, browser.execute_script("return document.body.innerText")
        time.sleep(0.1)
    return found


def cells(browser, table):
    """The cells' texts of each row, without the head."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#' + arguments[0] + ' tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText.trim()))",
        table,
    )


def shown(browser):
    return "rows/s" in text(browser, "#tiles") and cells(browser, "replicas")[0][5] != DASH


@browser_needed
def test_the_numbers_are_those_of_the_replicas(browser, page):
    with page(Running()):
        until(browser, lambda: shown(browser))
        # 160 rows/s, 5 forwards/s, 7 requests/s and 0.75 s of forwards a second, as Running makes them
        tiles = " ".join(text(browser, "#tiles").split())
        assert "Throughput 160 rows/s" in tiles
        assert "Requests 7 per second" in tiles
        assert "Replicas serving 1 of 3 wanted" in tiles
        first, second, none = cells(browser, "replicas")
        assert first[:5] == ["resnet", "a1", "serving", "rev-1", "10.0.0.1:7100"]
        assert first[5:] == ["160", "75%", "20", "32 of 64", "2", "3", "4", "30%", "3"]
        assert second[2] == "draining"
        assert none[:3] == ["llama", "-", "none of 1 serves"]
        jobs = cells(browser, "jobs")
        assert [row[1:4] for row in jobs] == [["exp-42", "2", "1"], ["sweep", "1", "3"]]
        assert [row[5:7] for row in jobs] == [["120", "75%"], ["40", "25%"]]
        assert [row[8:] for row in jobs] == [["7", "1"], ["0", "2"]]
        assert [row[2:] for row in cells(browser, "errors")] == [
            ["TeacherBusyError", "2"],
            ["TeacherForwardError", "1"],
        ]
        assert "No replica of llama serves" in text(browser, "#notice")
        until(browser, lambda: text(browser, "#news") == "live")


@browser_needed
def test_charts_have_lines_axes_units_and_a_legend(browser, page):
    with page(Running()):
        lines = "return [...document.querySelectorAll('.chart')].map(one => one.querySelectorAll('path.series').length)"
        until(browser, lambda: browser.execute_script(lines) == [1] * 6)
        captions = browser.execute_script(
            "return [...document.querySelectorAll('figcaption')].map(one => one.innerText)"
        )
        units = ["rows/s", "ms", "%", "rows per forward", "requests", "per second"]
        assert all(unit in caption for unit, caption in zip(units, captions, strict=True))
        assert text(browser, "#legend") == "resnet / a1"
        axis = browser.execute_script(
            "return [...document.querySelector('.chart').querySelectorAll('text')].map(one => one.textContent)"
        )
        assert axis[:5] == ["0", "50", "100", "150", "200"]
        assert {"now", MINUS + "15", "seconds"} <= set(axis)
        line = browser.execute_script("return document.querySelector('path.series').getAttribute('d')")
        assert "NaN" not in line
        # 160 of 200 on an axis from 12 to 156
        assert f"{12 + 144 * (1 - 160 / 200):.1f}" in line


@browser_needed
def test_the_pointer_shows_values(browser, page):
    with page(Running()):
        until(browser, lambda: shown(browser))
        browser.execute_script(
            "const svg = document.querySelector('.chart svg'), box = svg.getBoundingClientRect();"
            "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 10, clientY: box.top + 40}))"
        )
        assert "resnet / a1: 160 rows/s" in text(browser, ".tip")


@browser_needed
def test_a_jobs_name_is_text_and_nothing_else(browser, page):
    with page(Running(hostile=HOSTILE)):
        until(browser, lambda: shown(browser))
        assert cells(browser, "jobs")[1][1] == HOSTILE
        assert browser.title == "Schoolhouse"
        assert browser.execute_script("return document.querySelectorAll('img, table script').length") == 0


@browser_needed
def test_a_server_that_goes_away_and_comes_back(browser, page, kept_port):
    running = Running()
    with page(running, kept_port):
        until(browser, lambda: shown(browser))
    until(browser, lambda: "no answer for" in text(browser, "#news"))
    assert "No answer from the server for" in text(browser, "#alert")
    assert browser.execute_script(VISIBLE)
    with WebServer(running, port=kept_port):
        until(browser, lambda: text(browser, "#news") == "live")
        assert not browser.execute_script(VISIBLE)


@browser_needed
def test_no_traffic_is_said(browser, page):
    def idle():
        found = Running(idle=True)()
        found[0].replicas[0].load.uptime_s = 100 + time.monotonic()
        found[0].replicas[0].load.queued = found[0].replicas[0].load.in_flight = 0
        return found

    with page(idle):
        until(browser, lambda: "No traffic: no request for" in text(browser, "#notice"))
        assert cells(browser, "jobs")[0][6] == DASH  # a share of nothing


@browser_needed
def test_it_fits_narrow_screens_and_is_dark_for_who_wants_it(browser, page):
    def emulate(command, **settings):
        browser.execute_cdp_cmd(f"Emulation.{command}", settings)

    ground = "return getComputedStyle(document.body).backgroundColor"
    try:
        with page(Running(hostile="x" * 300)):
            until(browser, lambda: shown(browser))
            light = browser.execute_script(ground)
            emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
            until(browser, lambda: browser.execute_script(ground) != light)
            for width in (400, 1280):
                emulate("setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width == 400)
                until(
                    browser, lambda w=width: browser.execute_script("return document.documentElement.scrollWidth") <= w
                )
    finally:
        emulate("setEmulatedMedia", features=[])
        emulate("clearDeviceMetricsOverride")


@browser_needed
def test_a_real_server_is_shown(browser, x):
    with serve(Net(), http_port=0) as server, sh.connect(server.url, job="exp") as teacher:
        teacher.submit((x,), {}, [""]).result()
        browser.get(server.web.url)
        until(browser, lambda: [row[:3] for row in cells(browser, "replicas")] == [["teacher", "teacher", "serving"]])


def test_nothing_comes_from_elsewhere():
    with WebServer(Running()) as server:
        for path in web._PAGE:
            status, headers, body = fetch(server.url + path)
            assert status == 200
            assert b"://" not in body.replace(b'"http://www.w3.org/2000/svg"', b""), (
                path
            )  # a name, which nobody fetches
            assert b"innerHTML" not in body
            assert "text/" in headers["Content-Type"]
