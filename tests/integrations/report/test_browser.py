"""report.html in a real browser: complete on desktop and phone, in light and dark mode, and without scripts."""

import math
import shutil

import pytest
from playwright.sync_api import sync_playwright

from epo_kernels.train.config import load_config, to_yaml
from epo_kernels.train.data import Episode, Turn
from epo_kernels.train.envs import Observation, Task
from epo_kernels.train.evaluate import summarize
from epo_kernels.train.io.report import write_report
from epo_kernels.train.io.tracking import Tracker

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STEPS, TURNS = 40, 24
HOSTILE = "<script>hacked = 1</script><img src=x onerror='hacked = 1'><a href='http://evil.example'>go</a> \x1b[2J"


def step_metrics(step):
    progress = step / STEPS
    entropies = [0.9 - 0.5 * progress + 0.2 * math.sin(turn + step / 3) for turn in range(TURNS - step % 5)]
    return {
        "episode/reward/mean": progress**2,
        "episode/reward/std": 0.3,
        "episode/success_rate": round(32 * progress) / 32,
        "episode/played": 32,
        "episode/failed": int(step == 9),
        "episode/groups": 4,
        "episode/groups_without_variance": step * 4 // STEPS,
        "actor/entropy": sum(entropies) / len(entropies),
        "epo/entropy_by_turn": entropies,
        "epo/history_by_turn": [0.6] * len(entropies),
        "epo/band_low_share": 0.1 * progress,
        "epo/band_high_share": 0.3 * (1 - progress),
        "epo/phase_weight": 1 + math.exp(-6 * progress),
        "epo/penalty": 0.02 / step,
        "actor/pg_clipfrac": 0.01 * (1 + math.sin(step)),
        "actor/ppo_kl": 1e-4 * math.cos(step),
        "actor/kl_loss": 0.03 * progress,
        "actor/grad_norm": 1.5 + math.sin(step),
        "actor/lr": 3e-4 * (1 - progress),
        "response/repeated_token_share": 0.05 * progress,
        "response_length/mean": 4.0,
        "response_length/max": 16,
        "training/rollout_probs_diff_mean": 1e-7,
        "training/rollout_probs_diff_max": 1e-6,
        "timing_s/step": 7.0,
        "timing_s/gen_model": 3.0,
        "timing_s/gen_environment": 1.0,
        "timing_s/old_log_prob": 0.5,
        "timing_s/update_actor": 2.0,
    }


def episodes(successes):
    """That many tasks, of which the first `successes` are completed."""
    seen = Observation(f"Find the vault. {HOSTILE}", "You walk on.", f"A hall. {HOSTILE} {'long' * 80}")
    turns = [Turn(seen, [], [], [], f"go left {HOSTILE}", 0.25, bool(n % 2), result=HOSTILE) for n in range(12)]
    return [
        Episode(Task("walk", n), n, (0, 0, 0, n), turns=turns, score=100.0 * (n < successes), success=n < successes)
        for n in range(128)
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("a run with a rather long name")
    tracker = Tracker(run_dir, 0)
    for step in range(1, STEPS + 1):
        tracker.log(step, step_metrics(step))
    for panel, decoding in (("iid", "greedy"), ("iid", "sampled"), ("ood", "greedy"), ("ood", "sampled")):
        for when, step, successes in (("before", 0, 30), ("step 20", 20, 60), ("after", STEPS, 90)):
            played = episodes(successes)
            tracker.log_evaluation([summarize(played, when, step, panel, decoding)])
            tracker.save_episodes(f"{when.replace(' ', '_')}_{panel}_{decoding}", played)
    tracker.close()
    config = load_config("practice", ["loss.band_low=0.5", "loss.band_high=1.2", "watch.entropy_high=0.7"])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return write_report(run_dir)


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH (`apt-get install chromium`)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=[(1280, "light"), (768, "dark"), (360, "light"), (360, "dark")], ids=str)
def page(request, browser, report):
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.troubles = []
    page.on("request", lambda asked: asked.url.startswith("file:") or page.troubles.append(asked.url))
    page.on("console", lambda said: page.troubles.append(said.text))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("dialog", lambda dialog: page.troubles.append(dialog.message))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield page
    page.close()


def test_nothing_is_fetched_and_no_script_runs(page):
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('script, img, a, iframe, link').length") == 0
    assert page.troubles == []
    assert HOSTILE.replace("\x1b", "\\x1b") in page.inner_text("main")


def test_nothing_sticks_out(page):
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    sticking_out = page.evaluate(
        """[...document.querySelectorAll('.card')].flatMap(card => {
            const box = card.getBoundingClientRect();
            return [...card.querySelectorAll('svg, h3, p, .row, .legend, .versus, .key')].filter(part => {
                const own = part.getBoundingClientRect();
                return own.width && (own.left < box.left - 1 || own.right > box.right + 1);
            }).map(part => part.outerHTML.slice(0, 200));
        })"""
    )
    assert sticking_out == []


def test_every_chart_shows_something_and_no_label_covers_another(page):
    charts = page.evaluate(
        """[...document.querySelectorAll('svg')].map(svg => {
            const frame = svg.getBoundingClientRect();
            const drawn = [...svg.querySelectorAll('polyline, polygon, rect')].filter(shape => {
                const box = shape.getBoundingClientRect();
                return box.width + box.height > 4;
            });
            const texts = [...svg.querySelectorAll('text')];
            const labels = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
            const covered = labels.flatMap(([one, a], i) => labels.slice(i + 1).filter(([_, b]) =>
                a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1
            ).map(([other]) => `${one} and ${other}`));
            return {name: svg.ariaLabel, width: frame.width, height: frame.height, drawn: drawn.length, covered,
                    labels: labels.length, size: Math.min(...labels.map(([_, box]) => box.height))};
        })"""
    )
    assert len(charts) >= 18
    for chart in charts:
        assert chart["width"] > 200, chart
        assert chart["height"] > 100, chart
        assert chart["drawn"] > 0, chart
        assert chart["labels"] > 3, chart
        assert chart["covered"] == [], chart
        assert chart["size"] > 9, chart


def test_all_text_can_be_read(page):
    """The contrast of each text with its background by WCAG 2: 4.5 or more."""
    faint = page.evaluate(
        """(() => {
            const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
            const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
            const behind = element => {
                for (; element; element = element.parentElement) {
                    const colour = numbers(getComputedStyle(element).backgroundColor);
                    if (colour.length < 4 || colour[3] > 0) return colour;
                }
            };
            return [...document.querySelectorAll('main :not(title)')].filter(e =>
                [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
            ).map(e => {
                const style = getComputedStyle(e);
                const [a, b] = [light(numbers(e.closest('svg') ? style.fill : style.color)), light(behind(e))];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 120)];
            }).filter(([contrast]) => contrast < 4.5);
        })()"""
    )
    assert faint == []


def test_a_heat_map_says_its_values(page):
    told = page.evaluate("[...document.querySelectorAll('svg rect title')].map(title => title.textContent)")
    assert f"step {STEPS}, turn 1: {0.9 - 0.5 + 0.2 * math.sin(STEPS / 3):.3g} nats" in told
    assert any(text.endswith("above") for text in told)
    assert any(text.endswith("below") for text in told)
