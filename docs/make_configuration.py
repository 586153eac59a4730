"""Write docs/configuration.md from alexnet_jax/training/config.py: python docs/make_configuration.py"""

import inspect
import re
from pathlib import Path

from alexnet_jax.training import config as config_lib

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

This page is written by `python docs/make_configuration.py` from
[`training/config.py`](../alexnet_jax/training/config.py).

`--config=configs/NAME.py` picks a config and `--config.FIELD=VALUE` changes a field. All mistakes are reported at once.
For a misspelt field the message suggests the right one. A field that could not have any effect on the run is a mistake too. A config file of
your own may lie anywhere:

```python
from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.optim.learning_rate = 0.02
    return config
```

## Data sources

`data.source` is one of

- `folder:PATH`, with `train/<class>/` and `test/<class>/` (or `val`);
- `imagenet2012_256`, as [prepared](imagenet.md) from the archives;
- `textures`, ten classes of images that are drawn in seconds, which a linear classifier of pixels or of colours cannot separate;
- the name of any tfds data set that was prepared as `array_record`;
- `fake`, for benchmarks.

The mean image and the principal components of colour are read from beside the data, where
`python -m alexnet_jax.prepare statistics --source=folder:PATH` puts them. Without them, or if the number of images has changed
since, a run computes them from at most 10,000 images. Its first lines say which.

## The folder of a run

`--workdir` holds `config.json`, `classes.json` (names by label), `metrics.jsonl` (one record per line), `times.jsonl` (where the
time of each start went), TensorBoard's event files, `statistics.npz` and `checkpoints/`: the newest few and the best, each with the SHA-256
sums of its files. A run is resumed only with the same network, classes, number of images and `data.batch_size`.

## Fields
"""


def fields() -> list[tuple[str, str, str]]:
    """Return (field, default, comment) of every field, in the order of the source."""
    source = inspect.getsource(config_lib.get_config)
    defaults = config_lib.flat(config_lib.get_config().to_dict())
    names = {"config": ""}  # variable -> prefix of its fields
    rows, comment = [], []
    for line in source.splitlines():
        words = line.strip()
        if words.startswith("# "):
            comment.append(words[2:])
            continue
        group = re.fullmatch(r"(\w+)\.(\w+) = (\w+) = ConfigDict\(\)", words)
        field = re.match(r"(\w+)\.(\w+) = ", words)
        if group:
            names[group[3]] = f"{names[group[1]]}{group[2]}."
        elif field:
            name = names[field[1]] + field[2]
            rows.append((name, repr(defaults[name]), " ".join(comment)))
        comment = []
    assert {name for name, *_ in rows} == set(defaults)
    return rows


def page() -> str:
    """Return the text of docs/configuration.md."""
    lines, group = [INTRODUCTION.rstrip()], None
    for name, default, comment in fields():
        if group != (group := name.rpartition(".")[0]):
            title = f"`{group}`" if group else "The run"
            lines.append(
                f"\n### {title}\n\n| field | default | meaning | values |\n|---|---|---|---|"
            )
        words = config_lib.RANGES.get(name, ("", ""))[1]
        cells = [f"`{name}`", f"`{default}`", comment, words]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
