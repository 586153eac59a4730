"""Classification of a batch, ours against PyTorch's best form and the machine's limits.

    python -m benchmarks.speed.inference --out=DIR [--short] [--batch N ...]
        [--precision NAME ...]

The "paper" network with response normalisation, from uint8 images of 224 x 224 less
their mean to logits. On a CPU float32 at batch 128; on a GPU bfloat16, float32 and
tensorfloat32 at 128 and 1,024.
"""

from benchmarks.speed import side_by_side

if __name__ == "__main__":
    side_by_side.run("inference", __doc__)
