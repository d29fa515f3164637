"""The page in a real browser: what it shows, that it lives, and that it obeys its policy.

Every test ends with three checks: nothing on the console, no violation of the policy, no request
to another host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from sqlalchemy import select, update

from shoal.server.api.reported import plain
from shoal.server.store import Store
from shoal.server.store.tables import (
    Alert,
    Device,
    DriftState,
    Model,
    Rollout,
    RolloutDevice,
    RoundsRun,
)

from .conftest import DRIFTING, NOW_MS, V1, V2, WRISTS, Serve

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SCREENSHOTS = Path(__file__).resolve().parents[3] / "build" / "screenshots"

expect.set_options(timeout=20_000)  # ms; a machine with other work may stall for seconds

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(),
    reason=f"no {CHROMIUM}: the console's page is NOT tested; install the package chromium",
)

HOSTILE = [
    "<img src=x onerror=\"window.pwned='img'\">",
    "\"><script>window.pwned='script'</script>",
    "<svg/onload=\"window.pwned='svg'\">",
    "' autofocus onfocus='window.pwned=1",
    "javascript:window.pwned='url'",
    "{{constructor.constructor('window.pwned=1')()}}",
    "${window.pwned='template'}",
    "</title></style></textarea><iframe srcdoc=\"<script>parent.pwned='frame'</script>\">",
    '<a href="javascript:window.pwned=\'a\'" style="position:fixed;inset:0">x</a>',
    "{b|rich}{a|text}\u202egnp.exe",
]

WATCHER = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One chromium for this file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """Opens pages and keeps what they did wrong."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._pages: list[Page] = []
        self.faults: list[str] = []
        self.urls: list[str] = []

    def open(self, url: str, **settings: Any) -> Page:
        """Return a page in a fresh profile, once it shows data."""
        settings.setdefault("viewport", {"width": 1440, "height": 1000})
        context = self._browser.new_context(timezone_id="UTC", locale="en-GB", **settings)
        context.add_init_script(WATCHER)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("websocket", lambda opened: self.urls.append(opened.url))
        page.goto(url)
        page.wait_for_selector("main[aria-busy=false]")
        self._pages.append(page)
        return page

    def close(self, served_url: str) -> None:
        """Check the three rules and close every page."""
        for page in self._pages:
            self.faults += page.evaluate("window.violations")
            page.context.close()
        assert self.faults == []
        hosts = {urlsplit(url).netloc for url in self.urls if not url.startswith("data:")}
        assert hosts == {urlsplit(served_url).netloc}


@pytest.fixture
def watched(browser: Browser) -> Watched:
    """A watcher of pages; the test closes it."""
    return Watched(browser)


def settle(page: Page) -> None:
    """Wait until the chart is drawn."""
    page.wait_for_selector(".chart canvas")
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def sideways(page: Page) -> list[str]:
    """Return what reaches beyond the right edge of the window."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
          .filter((each) => each.getBoundingClientRect().right > innerWidth + 0.5
            && getComputedStyle(each).clipPath === "none" && !each.closest("thead"))
          .map((each) => each.outerHTML.slice(0, 120))"""
    )
    return found


def test_the_fleet_is_on_one_page(store: Store, serve: Serve, watched: Watched) -> None:
    """Devices, models, drift with its features, rollout, alerts and rounds can be read."""
    served = serve(store)
    page = watched.open(served.url)
    expect(page.locator("tbody tr")).to_have_count(10)
    expect(page.get_by_role("status")).to_have_text("Live")
    row = page.locator("tbody tr", has_text="wrist-09")
    for text in ("Online", "wearable v1", "Drifting", *DRIFTING["wrist-09"]):
        expect(row).to_contain_text(text)
    expect(page.locator("tbody tr", has_text="wrist-10")).to_contain_text("Silent")
    tiles = page.locator(".tiles")
    for text in ("9 / 10", "2 / 10", "4 / 10", "590", "4 lost", "1 quarantined"):
        expect(tiles).to_contain_text(text)
    rollout = page.locator("#rollouts")
    for text in (
        "4 confirmed",
        "2 on trial",
        "2 waiting",
        "of 10 devices",
        "PASS",
        "81.6% right answers before",
    ):
        expect(rollout).to_contain_text(text)
    expect(rollout.locator(".waves > li")).to_have_count(2)
    expect(page.locator("#alerts")).to_contain_text("3 open")
    expect(page.locator("#alerts")).to_contain_text("wrist-06 accel_y stands still")
    expect(page.locator("#rounds")).to_contain_text("Round 30 of 30")
    label = page.locator(".chart").get_attribute("aria-label") or ""
    assert "Wave 2 of wearable v2 began at" in label and "median accuracy went from" in label
    watched.close(served.url)


def test_a_change_arrives_by_itself(store: Store, serve: Serve, watched: Watched) -> None:
    """The page follows the database over its socket: no reload, no further request."""
    served = serve(store)
    page = watched.open(served.url)
    settle(page)
    page.evaluate("window.marked = true")
    asked = len(watched.urls)
    with store.begin() as session:
        late = session.scalars(select(Device).where(Device.name == "wrist-10")).one()
        late.online, late.seen_ms = True, served.clock()
        session.execute(
            update(RolloutDevice).where(RolloutDevice.rollout_id == "r2").values(state="confirmed")
        )
    expect(page.locator("tbody tr", has_text="wrist-10")).to_contain_text("Online")
    expect(page.locator(".tiles")).to_contain_text("10 / 10")
    expect(page.locator("#rollouts")).to_contain_text("8 confirmed")
    assert page.evaluate("window.marked") and len(watched.urls) == asked
    watched.close(served.url)


def test_a_lost_server_is_said_and_found_again(
    store: Store, serve: Serve, watched: Watched
) -> None:
    """What is shown stays, marked as old."""
    served = serve(store)
    page = watched.open(served.url)
    served.stop()
    expect(page.get_by_role("alert")).to_contain_text("connection to the server is lost")
    expect(page.get_by_role("status")).to_have_text("Reconnecting")
    expect(page.locator("tbody tr")).to_have_count(10)
    again = serve(store, port=urlsplit(served.url).port)
    expect(page.get_by_role("status")).to_have_text("Live", timeout=30_000)
    expect(page.get_by_role("alert")).to_have_count(0)
    watched.faults = [fault for fault in watched.faults if "ERR_CONNECTION_REFUSED" not in fault]
    watched.close(again.url)


def test_trouble_with_the_database_is_said(store: Store, serve: Serve, watched: Watched) -> None:
    """An operator sees that the figures are old, and a hint."""
    served = serve(store)
    page = watched.open(served.url)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE labels RENAME TO gone")
    expect(page.get_by_role("alert")).to_contain_text("database could not be read")
    expect(page.locator("tbody tr")).to_have_count(10)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO labels")
    expect(page.get_by_role("alert")).to_have_count(0)
    watched.close(served.url)


def test_an_empty_fleet_says_what_to_do(empty_store: Store, serve: Serve, watched: Watched) -> None:
    """Every panel that has nothing says why, and no figure is invented."""
    served = serve(empty_store)
    page = watched.open(served.url)
    for text in (
        "No device has enrolled", "No accuracy is known yet", "No rollout yet", "Nothing to tell",
        "No rounds yet",
    ):  # fmt: skip
        expect(page.get_by_text(text, exact=True)).to_be_visible()
    expect(page.locator(".tile", has_text="Accuracy now").locator(".value")).to_have_text("–")
    watched.close(served.url)


def test_the_theme_follows_the_system_and_can_be_chosen(
    store: Store, serve: Serve, watched: Watched
) -> None:
    """The choice is kept; both themes really differ."""
    served = serve(store)

    def background(page: Page, theme: str) -> str:
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    dark = watched.open(served.url, color_scheme="dark")
    light = watched.open(served.url, color_scheme="light")
    assert background(dark, "dark") != background(light, "light")
    dark.get_by_role("button", name="Switch to the light theme").click()
    assert background(dark, "light") == background(light, "light")
    dark.reload()
    dark.wait_for_selector("main[aria-busy=false]")
    assert background(dark, "light") == background(light, "light")
    light.emulate_media(color_scheme="dark")
    assert background(light, "dark") != background(dark, "light")
    watched.close(served.url)


def test_hostile_text_stays_text(store: Store, serve: Serve, watched: Watched) -> None:
    """Nothing that a device or a person writes becomes markup, in the page or in the chart."""
    with store.begin() as session:
        features = HOSTILE[:]
        for device in session.scalars(select(Device)):
            device.name = f"{HOSTILE[device.id % len(HOSTILE)]} {device.id}"
            said = [{"code": text, "severity": text, "text": text} for text in HOSTILE]
            monitor = {"withheld": 1, "sketch_hindrance": HOSTILE[device.id % len(HOSTILE)]}
            device.reported = {"model": V1, "state": {"warnings": said, "monitor": monitor}}
        session.execute(
            update(DriftState).values(
                verdict={"drifting": True, "features": features, "text": HOSTILE[0]}
            )
        )
        session.execute(update(Model).where(Model.sha256 == V2).values(name=HOSTILE[1]))
        session.execute(update(Rollout).values(reason=HOSTILE[0], state=HOSTILE[2]))
        session.execute(update(RolloutDevice).values(reason=HOSTILE[3]))
        rollout = session.get(Rollout, "r2")
        assert rollout is not None
        rollout.evidence = [
            {
                "wave": 0,
                "verdict": HOSTILE[0],
                "checks": [{"verdict": text, "text": text} for text in HOSTILE],
            }
        ]
        session.execute(update(RoundsRun).values(reason=HOSTILE[7]))
        for number, text in enumerate(HOSTILE):
            session.add(
                Alert(
                    id=100 + number, device_id=1 + number % 10, model_sha256=V1, kind=text,
                    state="open", text=text, evidence={}, opened_ms=NOW_MS,
                )
            )  # fmt: skip
    served = serve(store)
    page = watched.open(served.url)
    settle(page)
    page.get_by_role("button", name="Show all").click()
    for text in HOSTILE:
        expect(page.locator("#alerts p", has_text=text).first).to_be_visible()
    page.locator("button.mark").first.click()
    for text in HOSTILE:
        expect(page.locator(".told dd", has_text=plain(text)).first).to_be_visible()
    page.locator("tbody button.device").first.hover()
    box = page.locator(".chart").bounding_box()
    assert box is not None
    for step in range(1, 10):
        page.mouse.move(box["x"] + box["width"] * step / 10, box["y"] + box["height"] * 0.5)
    expect(page.locator(".tip").first).to_be_visible()
    assert page.evaluate("window.pwned") is None
    assert sideways(page) == []
    assert (
        page.locator("#console iframe, #console script, #console a[href^=javascript]").count() == 0
    )
    assert page.locator("#console img").count() == 1  # the mark in the header
    watched.close(served.url)


def test_the_table_works_by_keyboard(store: Store, serve: Serve, watched: Watched) -> None:
    """Filter, sort and pin without a mouse; the state is told to assistive technology."""
    served = serve(store)
    page = watched.open(served.url)
    page.keyboard.press("/")
    page.keyboard.type("gyro")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("#fleet .note")).to_have_text("1 of 10")
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    header = page.get_by_role("columnheader", name="Accuracy")
    header.get_by_role("button").focus()
    page.keyboard.press("Enter")
    expect(header).to_have_attribute("aria-sort", "ascending")
    expect(page.locator("tbody tr").first).to_contain_text("wrist-09")
    device = page.locator("#fleet").get_by_role("button", name="wrist-09")
    device.focus()
    page.keyboard.press("Enter")
    expect(device).to_have_attribute("aria-pressed", "true")
    segment = page.get_by_role("button", name=re.compile("^Silent"))
    segment.focus()
    page.keyboard.press("Space")
    expect(page.locator("tbody tr")).to_have_count(1)
    watched.close(served.url)


def test_a_device_says_what_it_cannot_tell(store: Store, serve: Serve, watched: Watched) -> None:
    """A mark in its row opens what it warns of and what to do; by keyboard as well."""
    served = serve(store)
    page = watched.open(served.url)
    fleet = page.locator("#fleet")
    expect(fleet.locator("button.mark")).to_have_text(["2 warnings", "Tells less"])
    row = fleet.locator("tbody tr", has_text="wrist-04")
    expect(row.locator('td[data-name="Drift"]')).to_have_text("Steady in part")
    mark = row.get_by_role("button", name="2 warnings")
    mark.focus()
    page.keyboard.press("Enter")
    expect(mark).to_have_attribute("aria-expanded", "true")
    told = fleet.locator("tr.told")
    for text in (
        "monitor.sketch", "600 features x 31 edges", "To mend: make the profile",
        "spool.refused", "raise spool.bytes_max", "Reported",
        "3,200 predictions withheld, 12 windows as bins alone",
    ):  # fmt: skip
        expect(told).to_contain_text(text)
    page.keyboard.press("Enter")
    expect(told).to_have_count(0)
    fleet.get_by_role("button", name=re.compile("^Warned")).click()
    expect(fleet.locator("tbody tr")).to_have_count(2)
    fleet.get_by_role("button", name="Tells less").click()
    expect(told).to_contain_text("1 of 4 predictions sketched")
    watched.close(served.url)


def test_an_alert_shows_its_evidence_and_the_commands(
    store: Store, serve: Serve, watched: Watched
) -> None:
    """The page changes nothing: it says which command does."""
    served = serve(store)
    page = watched.open(served.url)
    alert = page.locator("#alerts li", has_text="Site north")
    expect(alert).to_contain_text("Local shift · acknowledged")
    alert.get_by_text("Evidence and commands").click()
    for text in ("3 of 4 judged", "1 of 6", "gyro x (3), gyro z (2)", "on my way"):
        expect(alert.locator("dd", has_text=text)).to_be_visible()
    expect(alert.get_by_text("shoal alerts silence 2 --for 12h")).to_be_visible()
    expect(alert.get_by_text("shoal alerts ack 2")).to_have_count(0)
    expect(page.locator("#alerts")).to_contain_text("Accuracy loss (suspected)")
    watched.close(served.url)


def test_the_heat_map_is_read_by_device_by_site_and_over_time(
    store: Store, serve: Serve, watched: Watched
) -> None:
    """Also by keyboard, and in words: colour is never the only sign."""
    served = serve(store)
    page = watched.open(served.url)
    panel = page.locator("#drift")
    expect(panel.get_by_role("row")).to_have_count(11)
    cell = panel.get_by_role("cell", name="wrist-09, gyro x")
    expect(cell).to_have_attribute("title", re.compile("unlike the reference, evidence [2-9]"))
    device = panel.get_by_role("button", name="wrist-09")
    device.focus()
    page.keyboard.press("Enter")
    expect(device).to_have_attribute("aria-expanded", "true")
    history = panel.get_by_role("table", name="wrist-09 over time")
    expect(history.get_by_role("row")).to_have_count(8)
    expect(history.get_by_role("row").first.get_by_role("cell")).to_have_count(24)
    panel.get_by_role("button", name=re.compile("^Sites")).click()
    expect(history).to_have_count(0)
    expect(panel.get_by_role("row")).to_have_count(3)
    watched.close(served.url)


def test_the_chart_tells_more_under_the_pointer(
    store: Store, serve: Serve, watched: Watched
) -> None:
    """The tooltip names the median and the devices below it, lowest first."""
    served = serve(store)
    page = watched.open(served.url)
    settle(page)
    box = page.locator(".chart").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.4)
    page.mouse.move(box["x"] + box["width"] * 0.5 + 2, box["y"] + box["height"] * 0.4)
    tip = page.locator(".tip")
    expect(tip).to_contain_text("fleet median")
    rows = tip.locator("div").all_text_contents()
    named = [name for row in rows for name in WRISTS if row.startswith(name)]
    assert set(named[:3]) == set(DRIFTING)
    assert rows[-1] == "5 more above these"
    watched.close(served.url)


@pytest.mark.parametrize(
    ("name", "width", "scheme", "scale"),
    [("dark", 1440, "dark", 1), ("light", 1440, "light", 1), ("mobile", 390, "dark", 2)],
)
def test_it_fits_and_is_looked_at(
    store: Store, serve: Serve, watched: Watched, name: str, width: int, scheme: str, scale: int
) -> None:
    """Nothing reaches beyond the window; a picture is kept under build/screenshots."""
    served = serve(store)
    page = watched.open(
        served.url,
        viewport={"width": width, "height": 1000 if width > 1000 else 844},
        color_scheme=scheme,
        device_scale_factor=scale,
    )
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert sideways(page) == []
    assert page.evaluate(CUT_NAMES) == []
    page.locator("#drift").get_by_role("button", name="wrist-09").click()
    page.locator("#alerts summary").nth(1).click()
    page.locator("#fleet").get_by_role("button", name="2 warnings").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert sideways(page) == []
    page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"console-{name}.png", full_page=width > 1000)
    watched.close(served.url)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_can_be_read(store: Store, serve: Serve, watched: Watched, scheme: str) -> None:
    """Every text has at least 4.5 to 1 contrast to what is behind it (WCAG 2.2, 1.4.3)."""
    served = serve(store)
    page = watched.open(served.url, color_scheme=scheme)
    settle(page)
    page.locator("#drift").get_by_role("button", name="wrist-09").click()
    for summary in page.locator("#alerts summary").all():
        summary.click()
    page.locator("#fleet").get_by_role("button", name="2 warnings").click()
    assert page.evaluate(CONTRAST) == []
    watched.close(served.url)


def test_the_page_does_not_jump_while_it_loads(
    store: Store, serve: Serve, watched: Watched
) -> None:
    """Live updates and the first paint keep things where they are (layout shift below 0.05)."""
    served = serve(store)
    page = watched.open(served.url)
    settle(page)
    with store.begin() as session:
        session.execute(update(Device).values(seen_ms=served.clock(), online=False))
    expect(page.locator("tbody tr").first).to_contain_text("Silent")
    shift = page.evaluate(
        """() => new Promise((done) => new PerformanceObserver((list) => done(
          list.getEntries().filter((each) => !each.hadRecentInput)
            .reduce((sum, each) => sum + each.value, 0)))
          .observe({ type: "layout-shift", buffered: true }) ?? setTimeout(() => done(0), 500))"""
    )
    assert shift < 0.05
    watched.close(served.url)


CUT_NAMES = """() => [...document.querySelectorAll("#fleet button.device")]
  .filter((each) => each.scrollWidth > each.clientWidth).map((each) => each.textContent)"""

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.push(rgba(getComputedStyle(at).backgroundColor));
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("#console *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE)
      .map((node) => node.data.trim()).join("");
    if (!text || !element.checkVisibility()) continue;
    const below = behind(element);
    const a = luminance(over(rgba(getComputedStyle(element).color), below));
    const b = luminance(below);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${text}`);
  }
  return found;
}"""
