"""README and docs: links lead somewhere, names exist, generated pages are up to date."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from alexnet_jax import main
from alexnet_jax.models.ablations import ABLATIONS
from alexnet_jax.models.variants import VARIANTS
from alexnet_jax.training import config as config_lib

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "launch/README.md", *ROOT.glob("docs/*.md")])


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)|`", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
    for path in re.findall(r"`((?:tests|benchmarks|docs|alexnet_jax)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_readme_and_pages_stay_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 240
    for page in ROOT.glob("docs/*.md"):
        assert len(page.read_text().splitlines()) <= 250, page


def resolve(name: str) -> object:
    """Return the object of a dotted name below alexnet_jax."""
    parts = ["alexnet_jax", *name.split(".")]
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_names_on_the_page_about_the_paper_exist():
    text = (ROOT / "docs/paper.md").read_text()
    names = re.findall(r"`((?:models|data|training|analysis|sweeps)(?:\.\w+)+)`", text)
    assert len(names) > 30
    for name in names:
        resolve(name)
    for test in re.findall(r"`(\w+/test_\w+\.py)`", text):
        assert (ROOT / "tests" / test).exists(), test
    for path in re.findall(r"`((?:configs|launch)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_commands_on_the_page_about_the_paper_are_accepted(capsys):
    for span in re.findall(r"`([^`]+)`", (ROOT / "docs/paper.md").read_text()):
        words = shlex.split(span)
        if re.match(r"[\w.]+=", words[0]):
            words[0] = f"--config.{words[0]}"
        if words[0].startswith("--"):
            words = ["python", "-m", "alexnet_jax.main", *words]
        if words[0] != "python":
            continue
        name, *arguments = words[2:]
        module = importlib.import_module(name)
        if module is main:
            config = config_lib.get_config()
            _, fields = main._parser().parse_known_args(arguments)
            found = config_lib.set_fields(config, fields)
            config_lib.validate(config, devices=False, training=False, found=found)
        else:
            with pytest.raises(SystemExit, match="^0$"):
                module.main([*arguments, "--help"])
            flags = re.findall(r"--\w+", span)
            assert set(flags) <= set(re.findall(r"--\w+", capsys.readouterr().out)), span


def test_words_on_the_page_about_the_paper_exist():
    fields = config_lib.flat(config_lib.get_config().to_dict())
    words = {*ABLATIONS, *VARIANTS, *fields}
    code = ("models.", "data.", "training.", "analysis.", "sweeps.", "alexnet_jax")
    for span in re.findall(r"`([\w.]+)`", (ROOT / "docs/paper.md").read_text()):
        assert span in words or span.startswith(code) or ".py" in span, span


@pytest.mark.slow
def test_examples_of_the_page_about_extending_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/extending.md").read_text().replace('"textures"', '"textures/tiny"')
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, scope)  # noqa: S102
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    # Two steps of a network that guesses: (1 - 1/10)^2 ln(10) = 1.87.
    assert losses == pytest.approx([1.87, 1.87], abs=0.5)
    assert scope["model"].network.layers[5].name == "conv6"  # read from the file
    assert [row.name for row in scope["get_sweep"]().rows] == ["paper", "k=1, n=3"]


def test_page_of_the_configuration_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_configuration

    assert make_configuration.PAGE.read_text() == make_configuration.page()
    del sys.modules["make_configuration"]
