"""Evaluation that counts every example exactly once."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax

Sums = dict[str, jax.Array]


def evaluate(
    eval_step: Callable[[Any], Sums], batches: Iterable[Any], *, expected_count: int
) -> dict[str, float]:
    """Adds up `eval_step` over padded and masked batches.

    Args:
      eval_step: batch -> the sums of `metrics.sums` over its real examples, and
        perhaps those of several views, under "views_...".
      batches: device batches, the last one padded.
      expected_count: the size of the split.

    Returns:
      {"loss", "top1_error", "top5_error", "count"}: mean loss in nats, errors in
      [0, 1], number of examples; and of several views "views_loss",
      "views_top1_error", "views_top5_error".

    Raises:
      RuntimeError: if the number counted is not `expected_count`.
    """
    totals: dict[str, float] = collections.defaultdict(float)
    pending: collections.deque[Sums] = collections.deque()

    def add(sums: Sums) -> None:
        for name, value in jax.device_get(sums).items():
            totals[name] += float(value)  # float64: exact counts

    for batch in batches:
        pending.append(eval_step(batch))
        if len(pending) > 1:  # one batch computes while the next one is prepared
            add(pending.popleft())
    while pending:
        add(pending.popleft())
    count = round(totals["count"])
    if count != expected_count:
        raise RuntimeError(
            f"The evaluation counted {count} examples; the split has {expected_count}."
        )
    found: dict[str, float] = {}
    for views in ("", "views_"):
        if f"{views}count" in totals:
            found[f"{views}loss"] = totals[f"{views}loss"] / count
            found[f"{views}top1_error"] = 1.0 - totals[f"{views}top1"] / count
            found[f"{views}top5_error"] = 1.0 - totals[f"{views}top5"] / count
    return found | {"count": count}
