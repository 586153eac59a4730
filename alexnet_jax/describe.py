"""What a config builds, as a table: `main --mode=describe`."""

from alexnet_jax import experiment
from alexnet_jax.experiment import Config
from alexnet_jax.model import LayerSummary, summary


def describe(config: Config) -> str:
    """Shapes, parameters and multiply-adds of every layer, for one image.

    Without `model.num_classes` the classifier has as many units as the variant's
    own: no data is looked at.

    Raises:
      ConfigError: for a config that is wrong.
    """
    experiment.validate(config)
    network = experiment.make_model(config, config.model.num_classes or None)
    size = config.data.crop_size
    rows = summary(network, size)
    header = f"{network.network.name}, images of {size} x {size} x 3, {network.dtype}"
    return "\n".join([header, "", *table(rows)])


def table(rows: list[LayerSummary]) -> list[str]:
    """The rows as aligned lines, with a heading and a line of sums."""
    cells = [("layer", "output", "parameters", "multiply-adds")]
    for row in rows:
        shape = " x ".join(str(n) for n in row.shape)
        parameters = f"{row.parameters:,}" if row.parameters else ""
        multiply_adds = f"{row.multiply_adds:,}" if row.multiply_adds else ""
        cells.append((row.name, shape, parameters, multiply_adds))
    parameters = f"{sum(row.parameters for row in rows):,}"
    multiply_adds = f"{sum(row.multiply_adds for row in rows):,}"
    cells.append(("total", "", parameters, multiply_adds))
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
        for a, b, c, d in cells
    ]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
